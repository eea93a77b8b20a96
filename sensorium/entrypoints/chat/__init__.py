"""Conversations in a terminal: files beside the text, a model of this process or of a server, the reading of lines."""
