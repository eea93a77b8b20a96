"""Settings of the server itself; those of the engine are `EngineArgs`, those of media `MediaLimits`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from sensorium.errors import ConfigError
from sensorium.inputs.transcription import TranscriptionStyle
from sensorium.logger import FORMATS, LEVELS, LogSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerArgs:
    """How a server listens and whom it lets in."""

    host: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" for all."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    api_key: tuple[str, ...] = ()
    """Keys of which every request but those for health must bear one; may be given several times."""
    served_model_name: tuple[str, ...] = ()
    """Names of the model in requests; the name it was given by default."""
    allowed_origin: tuple[str, ...] = ()
    """Origins of web pages that may use the server from a browser; "*" for all."""
    allowed_host: tuple[str, ...] = ()
    """Names by which requests may call this server, beside localhost and addresses. By default a server on the loopback
    without API keys takes no others, and any other server takes all."""
    playground: bool = True
    """Serve a page to try the model from a browser at "/". It is open without a key; what it asks for is not."""
    ssl_certfile: str | None = None
    """Certificate for TLS."""
    ssl_keyfile: str | None = None
    """Key of the certificate."""
    log_level: str = "INFO"
    """"DEBUG", "INFO", "WARNING" or "ERROR"."""
    log_format: str = "text"
    """"text", or "json" for an object a line."""
    otlp_traces_endpoint: str | None = None
    """Where to send OpenTelemetry traces over HTTP, such as http://127.0.0.1:4318/v1/traces; nowhere by default."""
    drain_s: float = 30.0
    """How long open requests may go on after the server was told to stop."""
    restart_core: int = 0
    """Start a new engine core when it dies, up to so many times in a row; 0 ends the server instead."""
    max_body_bytes: int = 128 << 20
    """Bound on one request body."""
    max_waiting_bytes: int = 1 << 30
    """Bound on all bodies whose answers have not begun."""
    max_waiting_media_bytes: int = 4 << 30
    """Bound on all media, fetched and mapped, of requests whose answers have not begun; beyond it, 429."""
    max_connections: int = 4096
    """Connections at once; beyond it, 503."""

    allow_remote_media: bool = True
    """Fetch media from public addresses that requests name."""
    allowed_media_host: tuple[str, ...] = ()
    """The only hosts to fetch media from; any public host by default."""
    allowed_media_network: tuple[str, ...] = ()
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
    max_named_media_bytes: int = 256 << 20
    """Media kept under the names that requests gave them, so that they need not be sent again; 0 keeps none."""
    max_stored_responses: int = 4096
    """Responses of /v1/responses kept in memory to be come back to; 0 keeps none."""
    max_stored_response_bytes: int = 256 << 20
    """Bound on them together, the media in them included."""
    transcription_instruction: str | None = None
    """What the model is told to do with a sound that is to be transcribed; the model's own words by default."""
    transcription_answer: str | None = None
    """How it answers, with {text} for the transcript, such as "I hear: {text}."; the model's own way by default."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: got {self.port}, expected 0 to 65535. Set port.")
        if any(not key for key in self.api_key):
            raise ConfigError("api_key: got an empty key, expected at least one character. Remove it.")
        if self.log_format not in FORMATS:
            raise ConfigError(f"log_format: got {self.log_format!r}, expected one of {FORMATS}. Set log_format.")
        if self.log_level.upper() not in LEVELS:
            raise ConfigError(f"log_level: got {self.log_level!r}, expected one of {LEVELS}. Set log_level.")
        if self.otlp_traces_endpoint is not None and not _is_address(self.otlp_traces_endpoint):
            raise ConfigError(
                f"otlp_traces_endpoint: got {self.otlp_traces_endpoint!r}, expected an address such as "
                "'http://127.0.0.1:4318/v1/traces'. Set otlp_traces_endpoint."
            )
        for network in self.allowed_media_network:
            if not _is_network(network):
                raise ConfigError(
                    f"allowed_media_network: got {network!r}, expected a network such as '10.1.0.0/16' without host "
                    "bits. Set allowed_media_network."
                )
        if self.transcription_answer is not None:
            TranscriptionStyle(answer=self.transcription_answer)  # raises what is wrong with it
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile: got one of them, expected both or none.")
        if self.restart_core < 0:
            raise ConfigError(f"restart_core: got {self.restart_core}, expected at least 0. Set restart_core.")
        for name in ("max_body_bytes", "max_waiting_bytes", "max_waiting_media_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1. Set {name}.")
        for name in ("max_named_media_bytes", "max_stored_responses", "max_stored_response_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 0. Set {name}.")

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
    def log_settings(self) -> LogSettings:
        """How the log is written."""
        return LogSettings(self.log_level, self.log_format)


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True
