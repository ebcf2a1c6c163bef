"""What a model's forward does to logits behind its head: scaling and soft-capping."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LogitTransform:
    """`logit = cap * tanh(scale * (w·h) / cap)`, or `scale * (w·h)` without a cap.

    A fit on cached states has to apply it to the rows' products itself; a forward through the model does so already.

    Attributes:
        scale: Cohere's `logit_scale`, or the inverse of Granite's `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform off a model's configuration."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        return cls(
            scale=float(scale) / float(getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def inverse(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the products `w·h` that give these logits, of any shape; not finite at the cap and beyond it."""
        if self.softcap is not None:
            logits = torch.atanh(logits / self.softcap) * self.softcap
        return logits / self.scale

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from the head's plain products `w·h`, of any shape."""
        logits = products * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
