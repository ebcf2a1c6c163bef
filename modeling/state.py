"""The state that decides: the layer that the candidates' rows read, and the pooling of its positions.

The subject of a question shows in early layers, in the mean over its positions. Its difficulty shows in middle layers,
at its last token. A decision that reads a lower layer needs no layers above it. They are computed only when the meta
LLM itself answers.
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
    """Specification of the state that the candidates' rows read.

    Attributes:
        layer: Number of layers below the state, with the model's final norm behind them. None for the state that the
            model's own head reads at the last token, with the model's transform of its logits.
        pooling: State at the last token (`last`), mean over all tokens (`mean`), or the two side by side (`both`).
    """

    layer: int | None = None
    pooling: str = "last"

    @classmethod
    def parse(cls, text: str) -> "StateSpec":
        """Parse `head`, or a layer and a pooling such as `8:mean` or `16:last`. The default pooling is `last`.

        Raises:
            ExpertokenError: The text is neither.
        """
        if text == HEAD:
            return cls()
        # A manifest that was changed by hand may hold anything.
        layer, _, pooling = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not re.fullmatch(r"[1-9][0-9]{0,5}", layer) or (pooling or "last") not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise ExpertokenError(
                f"state: expected {HEAD}, or LAYER:POOLING such as 8:mean (poolings: {known}), got {text!r}"
            )
        return cls(int(layer), pooling or "last")

    def __str__(self) -> str:
        return HEAD if self.layer is None else f"{self.layer}:{self.pooling}"

    @property
    def parts(self) -> int:
        """Number of states side by side. A row is this many times as wide as the model."""
        return 2 if self.pooling == "both" else 1

    def columns(self, width: int) -> slice:
        """Return the columns of this state in `pooled(..., "both")`, for a model of width d."""
        return {"last": slice(0, width), "mean": slice(width, 2 * width)}.get(self.pooling, slice(None))


def candidates_for(layers: int) -> list[StateSpec]:
    """Return the states that `auto` compares, with the cheapest first.

    Of the states that need all layers the head's own comes first, because it is the simplest.

    Args:
        layers: Number of layers of the model.
    """
    depths = sorted({max(1, round(layers * part)) for part in _PARTS_OF_DEPTH} - {layers})
    lower = [StateSpec(depth, pooling) for depth in depths for pooling in POOLINGS]
    return [*lower, StateSpec(), StateSpec(layers, "mean"), StateSpec(layers, "both")]


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the index of each row's last token that is no padding, `[N]`, for padding on either side."""
    length = attention_mask.shape[1]
    return length - 1 - attention_mask.flip(1).argmax(1)


def pooled(values: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Combine the values at all positions by a pooling.

    Args:
        values: Values `[N, T, K]`.
        attention_mask: Attention mask `[N, T]`.
        pooling: One of `POOLINGS`.

    Returns:
        Values `[N, K]`, or `[N, 2K]` for `both`: the last token's values, then the mean.
    """
    parts = []
    if pooling != "mean":
        parts.append(values[torch.arange(len(values), device=values.device), last_positions(attention_mask)])
    if pooling != "last":
        outside = attention_mask[..., None] == 0  # a product with the mask would turn infinities of padding into NaN
        parts.append(values.masked_fill(outside, 0).sum(1) / (~outside).sum(1))
    return torch.cat(parts, -1)


def layer_stack(model: "PreTrainedModel") -> tuple[nn.Module, str]:
    """Return the module that holds the list of the model's layers, and the list's name in it.

    Raises:
        ExpertokenError: The model has no list of its layers.
    """
    count = number_of_layers(model)
    # In a model that reads pictures only the decoder is searched: the vision tower may have as many layers.
    root = model.get_decoder() if hasattr(model.config, "vision_config") else model
    names = [n for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not names:
        raise ExpertokenError(
            f"{type(model).__name__}: expected a list of {count} layers in the model, found none. Pass --state {HEAD}"
        )
    parent, _, name = min(names, key=lambda n: n.count(".")).rpartition(".")
    return root.get_submodule(parent), name


def number_of_layers(model: "PreTrainedModel") -> int:
    """Return the number of a model's layers."""
    return model.config.get_text_config().num_hidden_layers


def cut(model: "PreTrainedModel", layer: int) -> None:
    """Remove the layers above `layer` from a model, in place. Its final norm stays, and its logits are plain products.

    A scale or a soft cap of the logits is neutralised, because it is made for the last layer.

    Raises:
        ExpertokenError: The model has fewer layers.
    """
    config: Any = model.config.get_text_config()
    count = config.num_hidden_layers
    if layer > count:
        raise ExpertokenError(f"state: expected one of the model's {count} layers, from 1 to {count}, got {layer}")
    parent, name = layer_stack(model)
    setattr(parent, name, getattr(parent, name)[:layer])
    config.num_hidden_layers = layer
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:  # for example layer_types
            setattr(config, key, value[:layer])
    for owner in (config, model):
        for key, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
            if getattr(owner, key, None) is not None:
                setattr(owner, key, neutral)


class Enough(Exception):  # noqa: N818 - no error: it ends a pass whose upper layers are not needed
    """Signal that a forward pass can stop, because its needed states are known."""


class LayerReader:
    """Reader of the states behind layers of a whole model while it runs.

    Calling the layers by hand was rejected, because each architecture calls them in its own way.

    Args:
        model: Causal LM. One token is run through it at construction, to find the modules behind the last layer.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self._parent, name = layer_stack(model)
        self._layers: Any = getattr(self._parent, name)
        self._tail = self._find_tail()

    @torch.inference_mode()
    def _find_tail(self) -> list[nn.Module]:
        """Return the modules that states pass behind the last layer: the final norm, and in some a projection."""
        called: list[nn.Module] = []
        with self._hooked([self._layers[-1], *self._parent.children()], lambda module, _: called.append(module)):
            device = next(self.model.parameters()).device
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
        return called[called.index(self._layers[-1]) + 1 :]

    @contextmanager
    def _hooked(self, modules: Sequence[nn.Module], seen: Callable[[nn.Module, Any], None]) -> Iterator[None]:
        """Call `seen` with a module and its input states `[N, T, d]`, for passes of this thread alone."""
        thread = threading.get_ident()  # other threads generate answers with the same model meanwhile

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
        """Call `seen` with a layer's number and its states `[N, T, d]` when a pass reaches it, after the final norm.

        A pass ends without an error when `seen` raises `Enough`.
        """
        # The input of the next module is read instead of the layer's output: Qwen3-VL adds to states between layers.
        following = [*self._layers, *self._tail[:1]]
        if max(layers) >= len(following):
            raise ExpertokenError(
                f"{type(self.model).__name__}: expected a final norm after the layers, found none. Pass --state {HEAD}"
            )
        numbers = {following[layer]: layer for layer in layers}
        finishing = False  # True while the hook itself runs the tail, whose own calls must be ignored

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
