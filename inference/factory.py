"""Loading of what answers: a composite, or a gateway from its file."""

from pathlib import Path
from typing import Any

from .answering import AnsweringModel
from .composite_model import CompositeModel
from .gateway import GatewayModel


def open_model(
    path: Path | str,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    send_keys: bool = False,
    **options: Any,
) -> AnsweringModel:
    """Open what answers.

    Args:
        path: a composite's folder, `owner/name` of one on the hub, or a gateway's YAML file (see `gateway`).
        device: where models of a composite go.
        trust_remote_code: let the base model's repository run its own code.
        send_keys: agree to what a composite sends of this machine's keys; a gateway's file is its operator's own.
        **options: as `CompositeModel` takes them; a gateway takes those that need no models.

    Raises:
        ExpertokenError: it is no whole composite, or the file is not well formed.
    """
    if str(path).endswith((".yaml", ".yml")):
        return GatewayModel.from_yaml(path, **options)
    return CompositeModel.from_pretrained(
        path, device=device, trust_remote_code=trust_remote_code, send_keys=send_keys, **options
    )
