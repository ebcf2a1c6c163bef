"""Which state decides: the layer that the candidates' rows read, and how its positions are brought together.

What a question is about shows early, in the mean over its positions; how hard it is shows in the middle, at its last
token. A decision that reads a lower layer needs no more of the model than that: the layers above are computed only
where the meta LLM itself answers.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import ExpertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD, AUTO = "head", "auto"
POOLINGS = ("last", "mean", "both")

_PARTS_OF_DEPTH = (1 / 4, 1 / 2, 3 / 4)  # lower layers that `auto` tries


@dataclass(frozen=True)
class StateSpec:
    """Which state decides.

    Attributes:
        layer: number of layers below the state, with the model's final norm behind them. None: the state that the
            model's own head reads at the last token, whatever the model does to its logits.
        pooling: `last`: the state at the last token. `mean`: its mean over all tokens. `both`: one beside the other.
    """

    layer: int | None = None
    pooling: str = "last"

    @classmethod
    def parse(cls, text: str) -> "StateSpec":
        """Read `head`, or a layer and a pooling: `8:mean`, `16:last`; a layer alone is read at the last token.

        Raises:
            ExpertokenError: it is neither.
        """
        if text == HEAD:
            return cls()
        # A manifest that was changed by hand may hold anything.
        layer, _, pooling = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not re.fullmatch(r"[1-9][0-9]{0,5}", layer) or (pooling or "last") not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise ExpertokenError(f"state {text!r}: expected {HEAD}, or LAYER:POOLING such as 8:mean (of {known})")
        return cls(int(layer), pooling or "last")

    def __str__(self) -> str:
        return HEAD if self.layer is None else f"{self.layer}:{self.pooling}"

    @property
    def parts(self) -> int:
        """States that lie side by side: a row is as many times as wide as the model."""
        return 2 if self.pooling == "both" else 1

    def columns(self, width: int) -> slice:
        """Return the columns of this state in `pooled(..., "both")` of a model of width d."""
        return {"last": slice(0, width), "mean": slice(width, 2 * width)}.get(self.pooling, slice(None))


def candidates_for(layers: int) -> list[StateSpec]:
    """Return what `auto` chooses among for a model of so many layers, the cheapest first.

    Of those that need all layers the head's own comes first: it is the plain choice.

    Args:
        layers: of the model.
    """
    depths = sorted({max(1, round(layers * part)) for part in _PARTS_OF_DEPTH} - {layers})
    lower = [StateSpec(depth, pooling) for depth in depths for pooling in POOLINGS]
    return [*lower, StateSpec(), StateSpec(layers, "mean"), StateSpec(layers, "both")]


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index of each row's last real token, `[N]`, whichever side is padded."""
    length = attention_mask.shape[1]
    return length - 1 - attention_mask.flip(1).argmax(1)


def pooled(values: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Bring values at all positions together.

    Args:
        values: `[N, T, K]`.
        attention_mask: `[N, T]`.
        pooling: one of `POOLINGS`.

    Returns:
        `[N, K]`, or `[N, 2K]` for `both`: the last token's, then the mean.
    """
    parts = []
    if pooling != "mean":
        parts.append(values[torch.arange(len(values), device=values.device), last_positions(attention_mask)])
    if pooling != "last":
        outside = attention_mask[..., None] == 0  # not multiplied by it: 0 times an infinity of padding is NaN
        parts.append(values.masked_fill(outside, 0).sum(1) / (~outside).sum(1))
    return torch.cat(parts, -1)


def layer_stack(model: "PreTrainedModel") -> tuple[nn.Module, str]:
    """Return the module that holds the model's layers, and the name they have there.

    Raises:
        ExpertokenError: none is found.
    """
    count = number_of_layers(model)
    # Of a model that sees, the decoder's alone: what reads its pictures may have as many layers.
    root = model.get_decoder() if hasattr(model.config, "vision_config") else model
    names = [n for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not names:
        raise ExpertokenError(f"{type(model).__name__}: found no list of {count} layers in it; pass --state {HEAD}")
    parent, _, name = min(names, key=lambda n: n.count(".")).rpartition(".")
    return root.get_submodule(parent), name


def number_of_layers(model: "PreTrainedModel") -> int:
    """Return how many layers a model has."""
    return model.config.get_text_config().num_hidden_layers


def cut(model: "PreTrainedModel", layer: int) -> None:
    """Take the layers above `layer` out of a model, in place. Its final norm stays, and its logits are plain products.

    What a model does to its logits (a scale, a soft cap) is made for the last layer's.

    Raises:
        ExpertokenError: the model has fewer layers.
    """
    config: Any = model.config.get_text_config()
    count = config.num_hidden_layers
    if layer > count:
        raise ExpertokenError(f"state at layer {layer}: the model has {count} layers; expected 1 to {count}")
    parent, name = layer_stack(model)
    setattr(parent, name, getattr(parent, name)[:layer])
    config.num_hidden_layers = layer
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:  # layer_types, for one
            setattr(config, key, value[:layer])
    for owner in (config, model):
        for key, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
            if getattr(owner, key, None) is not None:
                setattr(owner, key, neutral)


class Enough(Exception):  # noqa: N818 - no error: it ends a pass whose upper layers nobody needs
    """Signal that a forward pass can stop: what was wanted of it is known."""


class LayerReader:
    """Reads states behind layers of a whole model while it runs.

    Calling the layers by hand was rejected: each architecture does that in a way of its own.

    Args:
        model: a causal LM. One token goes through it here, to see what it does behind its last layer.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self._parent, name = layer_stack(model)
        self._layers: Any = getattr(self._parent, name)
        self._tail = self._find_tail()

    @torch.inference_mode()
    def _find_tail(self) -> list[nn.Module]:
        """Return the modules that states pass behind the last layer: the final norm, and a projection in some."""
        called: list[nn.Module] = []
        with self._hooked([self._layers[-1], *self._parent.children()], lambda module, _: called.append(module)):
            device = next(self.model.parameters()).device
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
        return called[called.index(self._layers[-1]) + 1 :]

    @contextmanager
    def _hooked(self, modules: Sequence[nn.Module], seen: Callable[[nn.Module, Any], None]) -> Iterator[None]:
        """Call `seen` with a module and the states `[N, T, d]` that go into it, in this thread alone."""
        thread = threading.get_ident()  # others answer with the same model meanwhile

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                seen(module, inputs[0] if inputs else named.get("hidden_states"))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def reading(self, layers: Sequence[int], seen: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        """Call `seen` with a layer's number and its states `[N, T, d]`, the final norm applied, as a pass reaches it.

        A pass ends quietly where `seen` raises `Enough`.
        """
        # What goes into the next module, not what comes out of the layer: Qwen3-VL adds to states between its layers.
        following = [*self._layers, *self._tail[:1]]
        if max(layers) >= len(following):
            raise ExpertokenError(f"{type(self.model).__name__}: found no norm behind its layers; pass --state {HEAD}")
        numbers = {following[layer]: layer for layer in layers}
        finishing = False  # the tail runs here, too, and that is not the pass going on

        def note(module: nn.Module, hidden: Any) -> None:
            nonlocal finishing
            if finishing:
                return
            finishing = True
            for further in self._tail:
                hidden = further(hidden)
            finishing = False
            seen(numbers[module], hidden)

        try:
            with self._hooked(list(numbers), note):
                yield
        except Enough:
            pass
