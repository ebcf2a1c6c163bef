"""The meta LLM: a causal LM, its tokenizer, and the head that holds the expert tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .chat import Message, Query, encode_text, sight_of
from .dispatch import candidate_logits, dispatch_forward, positions
from .errors import ExpertokenError, one_line
from .fingerprint import fingerprint
from .head import ExpertHead, install_head, output_head
from .initialization import initial_row
from .inputs import padded
from .loading import context_length, load_causal_lm, share_weights
from .logits import LogitTransform
from .sharding import full_shape, is_split, overwrite, whole
from .sight import Sight
from .source import Source
from .state import HEAD, Enough, LayerReader, StateSpec, cut, number_of_layers, pooled
from .view import View

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MetaLLM:
    """A causal LM whose head holds one row per candidate.

    Args:
        model: Causal LM, whose head is replaced by an `ExpertHead`.
        tokenizer: Tokenizer with a chat template.
        source: Origin of the model, as composites record it.
        num_candidates: C, the number of experts, plus self if it is a candidate.
        quantization: Quantization of the model, or None.
        state: State that the rows read.
        base_fingerprint: Fingerprint of the model, if it is already known.

    Attributes:
        vocab_size: V, the number of rows of the original head.
        model: Model that decides: with the expert rows on its head, cut above the layer that they read.
        plain: Model over the same weights with the original head and without LoRA, for experts on the same base.
        base_fingerprint: Fingerprint of the model before any training.
        transform: Transform of logits behind the head.
        state: State that the rows read.
        view: Part of a conversation that the decision reads.
        positions: Longest context of the model in tokens, prompt and answer together.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        num_candidates: int,
        quantization: str | None = None,
        state: StateSpec = StateSpec(),  # noqa: B008 - frozen
        *,
        base_fingerprint: str | None = None,
    ) -> None:
        self.plain = model
        self.quantization = quantization
        self.base_fingerprint = base_fingerprint or fingerprint(model)
        self.tokenizer = tokenizer
        self.source = source
        self.vocab_size = full_shape(output_head(model).weight)[0]
        self.view = View()
        self.positions = context_length(model)
        self.read_at(state, num_candidates)

    def read_at(self, state: StateSpec, num_candidates: int) -> None:
        """Switch to another state for decisions. This resets the rows to zeros and drops an adapter.

        Args:
            state: State that the rows read from now on.
            num_candidates: C, the number of candidates.

        Raises:
            ExpertokenError: The model has no such layer, or no list of layers.
        """
        self.state = state
        self.model: PreTrainedModel = share_weights(self.plain)
        if state.layer is not None:
            cut(self.model, state.layer)
        self.transform = LogitTransform.of(self.model.config) if state.layer is None else LogitTransform()
        install_head(self.model, num_candidates, vocabulary=state.layer is None, parts=state.parts)
        if state.layer is not None and not is_split(self.model):
            self._check_cut(state.layer)
            # Rows made in the inference mode of `_check_cut` could not be trained, so new ones are made here.
            self.rows = torch.zeros(num_candidates, self.row_width)

    @torch.inference_mode()
    def _check_cut(self, layer: int) -> None:
        """Check on two tokens that the cut model gives plain products of the whole model's states at its last layer.

        Raises:
            ExpertokenError: The cut model gives other logits or states, or can't run.
        """
        batch = {
            key: torch.ones((1, 2), dtype=torch.long, device=self.device) for key in ("input_ids", "attention_mask")
        }
        rows = torch.randn(self.head.expert_rows.shape, generator=torch.Generator().manual_seed(0))
        why = "the logits or states of the cut model differ from those of the whole model"
        try:
            self.rows = rows
            with self._head_input() as read:
                logits = self.model(**batch, use_cache=False).logits
            whole = self._behind(batch, [layer])[layer]
            pairs = (
                (self.head(read[0]), logits),
                (pooled(read[0].float(), batch["attention_mask"], "both"), whole),
            )
            sound = all(
                torch.allclose(one.float(), two.to(one.device).float(), rtol=2e-2, atol=1e-3) for one, two in pairs
            )
        except Exception as error:  # each architecture has its own errors when a part of it runs alone
            sound, why = False, one_line(error)
        if not sound:
            raise ExpertokenError(
                f"{type(self.plain).__name__}: can't be read at layer {layer} ({why}). Pass --state {HEAD}"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: Source | str,
        num_candidates: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        attention: str | None = None,
        state: StateSpec = StateSpec(),  # noqa: B008 - frozen
    ) -> "MetaLLM":
        """Load a causal LM and add `num_candidates` zero rows. Arguments and errors as for `load_causal_lm`."""
        source = Source(source) if isinstance(source, str) else source
        model, tokenizer = load_causal_lm(
            source, device=device, dtype=dtype, quantization=quantization, attention=attention
        )
        return cls(model, tokenizer, source, num_candidates, quantization, state)

    def beside(self, num_candidates: int, state: StateSpec) -> "MetaLLM":
        """Return another meta LLM over the same weights, with its own zero rows.

        Args:
            num_candidates: C, the number of candidates.
            state: State that the rows read.
        """
        return MetaLLM(
            self.plain,
            self.tokenizer,
            self.source,
            num_candidates,
            self.quantization,
            state,
            base_fingerprint=self.base_fingerprint,
        )

    @property
    def layers(self) -> int:
        """Number of layers of the whole model."""
        return number_of_layers(self.plain)

    @property
    def first_candidate(self) -> int:
        """Column of the first candidate in the logits: V, or 0 if the vocabulary's logits are not computed."""
        return self.vocab_size if self.head.vocabulary else 0

    @property
    def row_width(self) -> int:
        """Width of a row: d, or 2d for rows that read two states."""
        return self.state.parts * self.head.in_features

    @property
    def adapted(self) -> bool:
        """True if the backbone has a LoRA adapter, so that `model` and `plain` differ."""
        return hasattr(self.model, "peft_config")

    @property
    def head(self) -> ExpertHead:
        """Head with the expert rows."""
        head: Any = self.model.get_output_embeddings()
        return head

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.head.weight.device

    @property
    def rows(self) -> torch.Tensor:
        """Copy of the candidates' rows, `[C, P d]` float32 on the CPU. P is 2 for rows that read two states, else 1."""
        return whole(self.head.expert_rows).float()

    @rows.setter
    def rows(self, rows: torch.Tensor) -> None:
        parameter = nn.Parameter(rows.to(self.device, torch.float32), requires_grad=self.head.expert_rows.requires_grad)
        self.head.expert_rows = parameter

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return LoRA's weights with PEFT's names in files, whole, on the CPU (collective if weights are split)."""
        from peft import get_peft_model_state_dict

        named = {name: whole(p) for name, p in self.model.named_parameters() if "lora_" in name}
        # Embeddings are not trained, and to save them PEFT would send a request to the hub at every checkpoint.
        return get_peft_model_state_dict(self.model, state_dict=named, save_embedding_layers=False)

    def set_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Copy weights as `adapter_state` returns them into the adapter, in place (collective if weights are split).

        Raises:
            ExpertokenError: The weights belong to another adapter.
        """
        named = {n.replace(".default.", "."): p for n, p in self.model.named_parameters() if "lora_" in n}
        differing = set(named) ^ set(state) or {k for k in named if full_shape(named[k]) != state[k].shape}
        if differing:
            raise ExpertokenError(
                f"expected LoRA weights of this model and rank, got others (first difference: {min(differing)})"
            )
        for name, parameter in named.items():
            overwrite(parameter, state[name])

    def initial_row(self, description: str) -> torch.Tensor:
        """Return the initial value of an expert row, `[P d]`. See `initialization.initial_row`."""
        row = initial_row(self.plain, encode_text(self.tokenizer, description).input_ids)
        return row.repeat(self.state.parts)

    def encode(self, conversation: str | Sequence[Message]) -> Query:
        """Return a conversation as a query that ends at the dispatch position. See `view.View.read`."""
        return self.view.read(self.tokenizer, conversation, self.vocab_size, self.positions - 1)

    def pad(self, queries: Sequence[Query], device: torch.device | str | None = None) -> dict[str, Any]:
        """Return a left-padded batch on the model's device, or on another. See `inputs.padded`."""
        return padded(queries, self.sight, device or self.device, self.plain.dtype)

    @property
    def sight(self) -> Sight | None:
        """Picture processor of the model, or None for a model that reads text only."""
        return sight_of(self.tokenizer)

    @torch.inference_mode()
    def states(self, queries: Sequence[Query]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states that a decision depends on besides the rows, float32 on the CPU.

        Returns:
            State h `[N, d]` and Z `[N]`. For a cut model the last token's state beside the mean, `[N, 2d]`, and zeros,
            because it has no Z.

        Raises:
            ExpertokenError: The model changes its logits in a way that `LogitTransform` does not cover.
        """
        batch = self.pad(queries)
        if self.state.layer is not None:
            with self._head_input() as read:
                self.model(**batch, position_ids=positions(self.model, batch), use_cache=False)
            both = pooled(read[0].float(), batch["attention_mask"], "both")
            return both.cpu(), torch.zeros(len(both))
        with self._head_input() as read:
            logits, _ = dispatch_forward(self.model, **batch)
        # The batch is padded on the left, so the head reads one position per row: `[N, 1, d]`.
        hidden = read[0][:, 0]
        vocabulary = logits[:, : self.vocab_size].float()
        self._check_transform(hidden, vocabulary)
        return hidden.float().cpu(), vocabulary.logsumexp(-1).cpu()

    @contextmanager
    def _head_input(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list that collects the head's input in each pass."""
        read: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            yield read
        finally:
            hook.remove()

    @torch.inference_mode()
    def states_behind(self, queries: Sequence[Query], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the states behind several layers of the plain model in one pass, by layer.

        Returns:
            States of each layer, `[N, 2d]` float32 on the CPU: the last token's state beside the mean.
        """
        return self._behind(self.pad(queries), layers)

    def _behind(self, batch: dict[str, Any], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        found = {}

        def keep(layer: int, hidden: torch.Tensor) -> None:
            found[layer] = pooled(hidden.float(), batch["attention_mask"], "both").cpu()
            if layer == max(layers):
                raise Enough

        with self.reader.reading(layers, keep):
            self.plain(**batch, position_ids=positions(self.plain, batch), use_cache=False, logits_to_keep=1)
        return found

    @cached_property
    def reader(self) -> LayerReader:
        """Reader of the plain model's layers while it runs."""
        return LayerReader(self.plain)

    def _check_transform(self, hidden: torch.Tensor, vocabulary: torch.Tensor) -> None:
        sample = slice(0, 8)
        bias = 0 if self.head.bias is None else self.head.bias[sample].float()
        expected = self.transform(hidden.float() @ self.head.weight[sample].float().T + bias)
        tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        finite = vocabulary[:, sample].isfinite().all(1)  # the caller reports rows that are not finite
        if not torch.allclose(expected[finite], vocabulary[finite, sample], rtol=tolerance, atol=tolerance * 10):
            raise ExpertokenError(
                f"{self.source.model}: expected logits changed by a scale or a soft cap at most, but its forward "
                "changes them differently. Train with `--method lora`, which runs the forward itself"
            )

    @torch.inference_mode()
    def candidate_logits(self, queries: Sequence[Query]) -> torch.Tensor:
        """Return the candidates' logits, `[N, C]` float32 on the CPU."""
        logits, _ = dispatch_forward(self.model, **self.pad(queries), pooling=self.state.pooling)
        return candidate_logits(logits, self.first_candidate).cpu()

    @torch.inference_mode()
    def probe(self, queries: Sequence[Query]) -> torch.Tensor:
        """Return the candidates' logits and Z, `[N, C + 1]` float32 on the CPU.

        Z changes with the base. For a cut model the logits alone are returned, `[N, C]`.
        """
        if self.state.layer is not None:
            return self.candidate_logits(queries)
        logits, _ = dispatch_forward(self.model, **self.pad(queries))
        mass = logits[:, : self.vocab_size].float().logsumexp(-1, keepdim=True)
        return torch.cat([candidate_logits(logits, self.vocab_size), mass], -1).cpu()

    def load_adapter(self, folder: Path) -> None:
        """Load a PEFT LoRA adapter into the backbone. The head is not changed.

        Raises:
            ExpertokenError: The adapter does not fit the model.
        """
        from peft import PeftModel

        try:
            adapted: Any = PeftModel.from_pretrained(self.model, folder).eval()
            self.model = adapted
        except Exception as error:  # PEFT raises ValueError, RuntimeError, KeyError, SafetensorError and others
            raise ExpertokenError(
                f"{folder}: expected an adapter that fits {self.source.model} ({one_line(error)})"
            ) from error
