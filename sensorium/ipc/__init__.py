"""Messages between the processes of an engine: bytes without pickle (`codec`), sockets without a name (`channel`)."""
