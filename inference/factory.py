"""Loading of a composite, or of a gateway from its file."""

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
    """Open a composite or a gateway.

    Args:
        path: Composite folder, `owner/name` of a composite on the hub, or YAML file of a gateway (see `gateway`).
        device: Device to load a composite's models on.
        trust_remote_code: If true, the base model's repository may run its own code.
        send_keys: Consent to sending this machine's keys to a composite's addresses. A gateway's file is the operator's
            own and needs none.
        **options: Further arguments of `CompositeModel`. A gateway accepts only options that need no local models.

    Raises:
        ExpertokenError: The folder is no complete composite, or the file is not well formed.
    """
    if str(path).endswith((".yaml", ".yml")):
        return GatewayModel.from_yaml(path, **options)
    return CompositeModel.from_pretrained(
        path, device=device, trust_remote_code=trust_remote_code, send_keys=send_keys, **options
    )
