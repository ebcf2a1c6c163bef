"""Settings of the server, which its operator chooses."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ...modeling.errors import ExpertokenError
from .keys import KEYS_VARIABLE


@dataclass(frozen=True)
class Settings:
    """Settings of the server.

    Attributes:
        name: Name of the composite for clients. Its experts are `name/expert`.
        host: Address to bind to.
        api_keys: Accepted API keys. Each request needs one. If there are none, no request needs a key.
        key_file: File of further keys, as hashes, with the experts that each may use. See `keys`.
        max_body: Largest body of a request, in bytes.
        max_messages: Longest conversation, in messages.
        max_prompt_tokens: Longest conversation, in tokens (approximately). None for the experts' own limits alone.
        max_new_tokens: Longest answer that a request can have, in tokens. None for the rest of the expert's context.
        max_concurrent: Requests at a time. Further requests get status 503 with Retry-After.
        rate: Requests of one key (or address) per minute. None for no limit.
        log_content: If true, messages and answers are written to the log.
        image_hosts: Hosts whose picture addresses are passed on to experts. Any other address is refused.
        hosts: Further host names that requests may use while there are no keys.
        origins: Origins of pages on other hosts that may send requests from a browser.
        ext_proc: Port of the external processor for Envoy, see `envoy`. 0 for a free one, None for no processor.
        feedback: File for users' judgements of answers, with their messages. None to accept no judgements.
        check_interval: Seconds between health checks of an expert's several addresses. 0 for no checks.
        session_store: URL of the Redis in which several servers share sessions. None for this process's memory.

    Raises:
        ExpertokenError: The host can be reached from other machines, or requests come through Envoy, and there are no
            API keys.
    """

    name: str = "composite"
    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    key_file: Path | None = None
    max_body: int = 16 * 2**20
    max_messages: int = 512
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_concurrent: int = 256
    rate: int | None = None
    log_content: bool = False
    image_hosts: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    session_store: str | None = None
    check_interval: float = 10.0
    feedback: Path | None = None
    ext_proc: int | None = None

    def __post_init__(self) -> None:
        if self.api_keys or self.key_file is not None:
            return
        if self.ext_proc is not None:  # every request comes from Envoy, so its own origin is unknown
            raise ExpertokenError(
                "--ext-proc: needs API keys, since Envoy's clients are other machines. Pass --keys FILE."
            )
        if not is_loopback(self.host):
            raise ExpertokenError(
                f"--host {self.host} can be reached from other machines, so the server needs API keys. Put them, "
                f"separated by commas, into the environment variable {KEYS_VARIABLE} or a file (--keys), or bind to "
                "127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    """Check whether a name or address is this machine's own."""
    return host == "localhost" or _is_loopback_address(host) is True


def is_elsewhere(host: str) -> bool:
    """Check whether an address is another machine's. A client of a Unix socket has no address."""
    return _is_loopback_address(host) is False


def _is_loopback_address(host: str) -> bool | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
