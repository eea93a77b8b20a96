"""Settings of the server itself; those of the engine are `EngineArgs`, those of media `MediaLimits`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from sensorium.config import Amount, BytesOrNone, Count, NumBytes
from sensorium.entrypoints.openai.connections import Deadlines
from sensorium.errors import ConfigError
from sensorium.inputs.transcription import TranscriptionStyle
from sensorium.logger import LogFormat, LogLevel, LogSettings
from sensorium.settings import Bounds, FileName, check_settings, wrong_setting

Name: TypeAlias = Annotated[str, FileName()]
"""A text that is not empty."""
Patience: TypeAlias = Annotated[float, Bounds(0, 86400, above=True)]
"""How long a client may take, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerArgs:
    """How a server listens and whom it lets in."""

    host: Name = "127.0.0.1"
    """Address to listen on; "0.0.0.0" for all."""
    port: Annotated[int, Bounds(0, 65535)] = 8000
    """Port to listen on; 0 for any that is free."""
    api_key: tuple[Name, ...] = ()
    """Keys of which every request but those for health must bear one; may be given several times."""
    served_model_name: tuple[Name, ...] = ()
    """Names of the model in requests; the name it was given by default."""
    allowed_origin: tuple[Name, ...] = ()
    """Origins of web pages that may use the server from a browser; "*" for all."""
    allowed_host: tuple[Name, ...] = ()
    """Names by which requests may call this server, beside localhost and addresses. By default a server on the loopback
    without API keys takes no others, and any other server takes all."""
    playground: bool = True
    """Serve a page to try the model from a browser at "/". It is open without a key; what it asks for is not."""
    ssl_certfile: Name | None = None
    """Certificate for TLS."""
    ssl_keyfile: Name | None = None
    """Key of the certificate."""
    log_level: LogLevel = "INFO"
    """The least important lines to write."""
    log_format: LogFormat = "text"
    """"text", or "json" for an object a line."""
    otlp_traces_endpoint: Name | None = None
    """Where to send OpenTelemetry traces over HTTP, such as http://127.0.0.1:4318/v1/traces; nowhere by default."""
    drain_s: Annotated[float, Bounds(0, 86400)] = 30.0
    """How long open requests may go on after the server was told to stop."""
    restart_core: Amount = 0
    """Start a new engine core when it dies, up to so many times in a row; 0 ends the server instead."""
    max_body_bytes: NumBytes = 128 << 20
    """Bound on one request body."""
    max_waiting_bytes: NumBytes = 1 << 30
    """Bound on all bodies whose answers have not begun."""
    max_waiting_media_bytes: NumBytes = 4 << 30
    """Bound on all media, fetched and mapped, of requests whose answers have not begun; beyond it, 429."""
    max_connections: Count = 4096
    """Connections at once; beyond it, 503."""
    handshake_timeout_s: Patience = 10.0
    """How long a client may take for the handshake of TLS, in seconds."""
    head_timeout_s: Patience = 10.0
    """How long a request's head may take, from the connection or its first byte on, in seconds; then 408."""
    body_timeout_s: Patience = 20.0
    """In any such time, in seconds, a request's body has to bring `min_body_bytes`, or its end; else 408."""
    min_body_bytes: NumBytes = 10 << 10
    """What a body has to bring in `body_timeout_s`."""
    read_timeout_s: Patience = 60.0
    """How long a client may take nothing of what is sent to it, in seconds; then the connection is closed."""
    keep_alive_s: Annotated[int, Bounds(1, 86400)] = 30
    """How long a connection is kept open between an answer and the next request, in seconds."""

    share_caches: bool = False
    """Let requests of all API keys share what is cached: faster where many send the same, but by `cached_tokens`, and
    by how soon an answer begins, one key's holder can find out what another's has asked."""
    min_priority: Annotated[int, Bounds(-(1 << 31), 0)] = 0
    """The most urgent priority that requests may claim under the priority policy; lower is more urgent. By default they
    can only stand back."""

    allow_remote_media: bool = True
    """Fetch media from public addresses that requests name."""
    allowed_media_host: tuple[Name, ...] = ()
    """The only hosts to fetch media from; any public host by default."""
    allowed_media_network: tuple[Name, ...] = ()
    """Networks, such as 10.1.0.0/16, to fetch from although they are not public."""
    allow_embeddings: bool = False
    """Take embeddings (safetensors) instead of media."""
    allow_mm_processor_kwargs: bool = False
    """Let requests choose how their media are processed."""
    trust_request_chat_template: bool = False
    """Let requests bring chat templates."""
    strict_reasoning_effort: bool = False
    """Refuse `reasoning_effort` where the model's chat template has no setting for it; by default it is passed over,
    and the answer has a header `Warning` that says so."""
    max_named_media_bytes: BytesOrNone = 256 << 20
    """Media kept under the names that requests gave them, so that they need not be sent again; 0 keeps none."""
    max_stored_responses: Amount = 4096
    """Responses of /v1/responses kept in memory to be come back to; 0 keeps none."""
    max_stored_response_bytes: BytesOrNone = 256 << 20
    """Bound on them together, the media in them included."""
    transcription_instruction: str | None = None
    """What the model is told to do with a sound that is to be transcribed; the model's own words by default."""
    transcription_answer: str | None = None
    """How it answers, with {text} for the transcript, such as "I hear: {text}."; the model's own way by default."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.transcription_answer is not None:
            TranscriptionStyle(answer=self.transcription_answer)  # raises what is wrong with it
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile: got one of them, expected both or none.")
        for text in self.allowed_media_network:
            try:
                ipaddress.ip_network(text)
            except ValueError:
                raise wrong_setting("allowed_media_network", text, "a network such as '10.1.0.0/16'") from None
        if not self.allow_remote_media and (self.allowed_media_host or self.allowed_media_network):
            raise ConfigError(
                "allow_remote_media: got false beside allowed_media_host or allowed_media_network, expected one of "
                "both. Leave out --no-allow-remote-media, or the hosts and networks."
            )
        if self.otlp_traces_endpoint is not None and not _is_web_address(self.otlp_traces_endpoint):
            raise wrong_setting("otlp_traces_endpoint", self.otlp_traces_endpoint, "an http or https address")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def host_names(self) -> tuple[str, ...] | None:
        """Names that a `Host` header may have, beside addresses and those of the loopback; None for any."""
        return self.allowed_host if self.allowed_host or (self.is_local and not self.api_key) else None

    @property
    def deadlines(self) -> Deadlines:
        """How long clients may take."""
        return Deadlines(
            handshake_s=self.handshake_timeout_s,
            head_s=self.head_timeout_s,
            body_s=self.body_timeout_s,
            min_body_bytes=self.min_body_bytes,
            reading_s=self.read_timeout_s,
        )

    @property
    def log_settings(self) -> LogSettings:
        """How the log is written."""
        return LogSettings(self.log_level, self.log_format)


def _is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
