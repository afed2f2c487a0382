"""What a person chooses about a server, and the bounds a caller cannot pass.

Knows nothing of HTTP libraries or models. No torch.
"""

import ipaddress
from dataclasses import dataclass

from deltamoe.errors import ConfigError

__all__ = [
    "MAX_ANSWER_TOKENS",
    "MAX_CHOICES",
    "MAX_LISTED_LOGPROBS",
    "MAX_LOGPROBS",
    "MAX_PROMPTS",
    "MAX_SCHEMA_BYTES",
    "MAX_STATE_NAME",
    "Settings",
    "is_loopback",
]

MAX_CHOICES = 8  # n of one prompt
MAX_LOGPROBS = 20  # alternatives listed a token
MAX_PROMPTS = 256  # of one request
MAX_SCHEMA_BYTES = 1 << 16  # of the JSON schema of an answer or of a tool's arguments
MAX_STATE_NAME = 64  # characters of a kept text's id
MAX_ANSWER_TOKENS = 1 << 18  # of all choices of one request together
MAX_LISTED_LOGPROBS = 1 << 19  # numbers in one answer, about 100 bytes each on the way
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server shows itself, whom it answers, and how much a caller may ask for.

    Attributes:
        model_id: the model's name in requests and answers.
        host, port: where it listens; port 0 takes a free one.
        api_keys: whoever sends one of these is answered; none answers everybody.
        allows_strangers: listen beyond this machine without a key.
        shares_prefixes: what one key's requests have read need not be read again for another's.
            The time to the first token then tells whether somebody has sent the same.
        allowed_hosts: names that may stand in a request's Host header beside addresses.
        allowed_origins: web pages that may call, as "https://example.org".
        max_tokens: most tokens of one choice; what is drawn if a request does not say.
        max_body_bytes: of one request.
        max_connections, max_connections_per_address: open at once. This machine's own programs
            are not counted by address.
        receive_timeout_s: for a request to arrive whole.
        keep_alive_s: that an idle connection stays open.
        write_timeout_s: that a client may read nothing while its answer waits.
        grace_s: for running requests once the process was told to end.
        heartbeat_limit_s: that the engine may stay silent before it counts as sick.
        max_states, max_state_bytes: kept texts, the longest unused going first.

    Raises:
        ConfigError: listening beyond this machine without a key, or a value out of range.
    """

    model_id: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allows_strangers: bool = False
    shares_prefixes: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_tokens: int = 4096
    max_body_bytes: int = MIB
    max_connections: int = 512
    max_connections_per_address: int = 64
    receive_timeout_s: float = 10.0
    keep_alive_s: int = 5
    write_timeout_s: float = 30.0
    grace_s: float = 10.0
    heartbeat_limit_s: float = 30.0
    max_states: int = 64
    max_state_bytes: int = 1024 * MIB

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_keys and not self.allows_strangers:
            raise ConfigError(
                f"host = {self.host}: other machines could use this model without a key; "
                "give --api-key, or --allow-strangers if that is meant"
            )
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port = {self.port}: expected 0 to 65535")
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    "an API key must be at least 8 printable ASCII characters without blanks"
                )
        if "*" in self.allowed_origins:
            raise ConfigError(
                "allowed origin '*': any web page could call this server from a visitor's browser; "
                "name the origins, as https://example.org"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens = {self.max_tokens}: expected a whole number >= 1")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
