"""Scaling and soft-capping that a model's forward applies to logits behind its head."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LogitTransform:
    """The transform `logit = cap * tanh(scale * (w·h) / cap)`, or `scale * (w·h)` without a cap.

    A fit on cached states must apply it to the rows' products itself. A forward through the model already does.

    Attributes:
        scale: Cohere's `logit_scale`, or the inverse of Granite's `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a model's configuration."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        return cls(
            scale=float(scale) / float(getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def inverse(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the products `w·h` behind logits of any shape. They are not finite at the cap and beyond it."""
        if self.softcap is not None:
            logits = torch.atanh(logits / self.softcap) * self.softcap
        return logits / self.scale

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Return logits from the head's plain products `w·h`, of any shape."""
        logits = products * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
