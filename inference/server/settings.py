"""What an operator sets."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ...modeling.errors import ExpertokenError
from .keys import KEYS_VARIABLE


@dataclass(frozen=True)
class Settings:
    """How a composite is served.

    Attributes:
        name: of the composite, as clients call it; its experts are `name/expert`.
        host: address it is bound to.
        api_keys: one of them has to come with each request; nobody is asked where there are none.
        key_file: further ones, as hashes, with what each may use; see `keys`.
        max_body: bytes of a request.
        max_messages: of a conversation.
        max_prompt_tokens: longest conversation, in tokens, about; no limit but the experts' own where None.
        max_new_tokens: of an answer: the most that can be asked for; what the expert's context leaves where None.
        max_concurrent: requests at a time; those above are told to come again.
        rate: requests of one key (or address) in a minute; None for no limit.
        log_content: write questions and answers to the log.
        image_hosts: hosts whose addresses of pictures are passed on to experts; any other address is refused.
        hosts: further names by which this server is asked for without keys.
        origins: of pages elsewhere that may ask from a browser.
        feedback: file that gets what people think of answers, with what they asked; None to take none.
        check_interval: seconds between two questions whether an address is up, of experts with several; 0 asks none.
        session_store: URL of the Redis that several servers remember sessions in; None for this process's memory.

    Raises:
        ExpertokenError: the host can be reached from elsewhere, and there are no API keys.
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

    def __post_init__(self) -> None:
        if not self.api_keys and self.key_file is None and not is_loopback(self.host):
            raise ExpertokenError(
                f"--host {self.host} can be reached from elsewhere: put API keys, separated by commas, into the "
                f"environment variable {KEYS_VARIABLE} or a file (--keys), or bind to 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    return host == "localhost" or _is_loopback_address(host) is True


def is_elsewhere(host: str) -> bool:
    """Whether an address is not this machine's own; whoever comes by a socket of the file system has none."""
    return _is_loopback_address(host) is False


def _is_loopback_address(host: str) -> bool | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
