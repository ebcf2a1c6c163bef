"""The meta LLM: a causal LM, its tokenizer, and the head that holds the expert tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .chat import Message, Query, read_query
from .dispatch import candidate_logits, dispatch_forward
from .errors import ExpertokenError, one_line
from .fingerprint import fingerprint
from .head import ExpertHead, install_head, output_head
from .initialization import initial_row
from .loading import load_causal_lm, share_weights
from .logits import LogitTransform
from .sharding import full_shape, overwrite, whole
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MetaLLM:
    """A causal LM whose head holds one row per expert.

    Args:
        model: the causal LM (its head is replaced by an `ExpertHead`).
        tokenizer: with a chat template.
        source: where the model came from, as composites record it.
        num_experts: K.
        quantization: of the model, or None.

    Attributes:
        vocab_size: V, the rows of the original head; expert k has the id `V + k`.
        plain: the same weights with the original head and without LoRA, for experts on the same base.
        base_fingerprint: of the model before anything was trained.
        transform: what the model does to logits behind its head.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        num_experts: int,
        quantization: str | None = None,
    ) -> None:
        self.plain = model
        self.quantization = quantization
        self.base_fingerprint = fingerprint(model)
        self.model: PreTrainedModel = share_weights(model)
        self.tokenizer = tokenizer
        self.source = source
        self.vocab_size = full_shape(output_head(model).weight)[0]
        self.transform = LogitTransform.of(model.config)
        install_head(self.model, num_experts)

    @classmethod
    def from_pretrained(
        cls,
        source: Source | str,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        attention: str | None = None,
    ) -> "MetaLLM":
        """Load a causal LM and give it `num_experts` expert rows (zeros). Arguments and errors as `load_causal_lm`."""
        source = Source(source) if isinstance(source, str) else source
        model, tokenizer = load_causal_lm(
            source, device=device, dtype=dtype, quantization=quantization, attention=attention
        )
        return cls(model, tokenizer, source, num_experts, quantization)

    @property
    def adapted(self) -> bool:
        """Whether LoRA is on the backbone, so that `model` is another model than `plain`."""
        return hasattr(self.model, "peft_config")

    @property
    def head(self) -> ExpertHead:
        """The head with the expert rows."""
        head: Any = self.model.get_output_embeddings()
        return head

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    @property
    def rows(self) -> torch.Tensor:
        """A copy of the expert rows, `[K, d]` float32 on the CPU."""
        return whole(self.head.expert_rows).float()

    @rows.setter
    def rows(self, rows: torch.Tensor) -> None:
        parameter = nn.Parameter(rows.to(self.device, torch.float32), requires_grad=self.head.expert_rows.requires_grad)
        self.head.expert_rows = parameter

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """LoRA's weights as PEFT names them in a file, whole, on the CPU (collective where weights are split)."""
        from peft import get_peft_model_state_dict

        named = {name: whole(p) for name, p in self.model.named_parameters() if "lora_" in name}
        return get_peft_model_state_dict(self.model, state_dict=named)

    def set_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put weights as `adapter_state` gives them into the adapter, in place (collective likewise).

        Raises:
            ExpertokenError: they are another adapter's.
        """
        named = {n.replace(".default.", "."): p for n, p in self.model.named_parameters() if "lora_" in n}
        differing = set(named) ^ set(state) or {k for k in named if full_shape(named[k]) != state[k].shape}
        if differing:
            raise ExpertokenError(f"the adapter's weights are of another model or rank (at {min(differing)})")
        for name, parameter in named.items():
            overwrite(parameter, state[name])

    def initial_row(self, description: str) -> torch.Tensor:
        """Return the first value of an expert's row, `[d]`; see `initialization.initial_row`."""
        return initial_row(self.plain, self.tokenizer(description, add_special_tokens=False).input_ids)

    def encode(self, conversation: str | Sequence[Message], most: int | None = None) -> Query:
        """Return a conversation as a query that ends at the dispatch position; see `chat.read_query`."""
        return read_query(self.tokenizer, conversation, self.vocab_size, most=most)

    def pad(self, queries: Sequence[Query], device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Return a left-padded batch: `input_ids` and `attention_mask`, `[N, T]` each.

        Left, so that all dispatch positions fall into one column and one row of logits per query is computed.

        Args:
            queries: N queries.
            device: device of the batch; the model's where None.
        """
        longest = max(map(len, queries))
        # Which id pads does not matter: it is masked. 0 exists in every vocabulary, a pad token does not.
        ids = np.zeros((len(queries), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, query in enumerate(queries):
            ids[row, longest - len(query) :] = query.ids
            mask[row, longest - len(query) :] = 1
        device = device or self.device
        return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}

    @torch.inference_mode()
    def states(self, queries: Sequence[Query]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a decision depends on besides the rows: h `[N, d]` and Z `[N]`, float32 on the CPU.

        Raises:
            ExpertokenError: the model does something to its logits that `LogitTransform` does not know.
        """
        captured: list[torch.Tensor] = []
        # The batch is padded on the left, so the head sees one position per row: `[N, 1, d]`.
        hook = self.head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0][:, 0]))
        try:
            logits, _ = dispatch_forward(self.model, **self.pad(queries))
        finally:
            hook.remove()
        hidden = captured[0]
        vocabulary = logits[:, : self.vocab_size].float()
        self._check_transform(hidden, vocabulary)
        return hidden.float().cpu(), vocabulary.logsumexp(-1).cpu()

    def _check_transform(self, hidden: torch.Tensor, vocabulary: torch.Tensor) -> None:
        sample = slice(0, 8)
        bias = 0 if self.head.bias is None else self.head.bias[sample].float()
        expected = self.transform(hidden.float() @ self.head.weight[sample].float().T + bias)
        tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        finite = vocabulary[:, sample].isfinite().all(1)  # the caller reports the others
        if not torch.allclose(expected[finite], vocabulary[finite, sample], rtol=tolerance, atol=tolerance * 10):
            raise ExpertokenError(
                f"{self.source.model}: its forward changes logits in a way that is not known here (neither a scale nor "
                "a soft cap); train with `--method lora`, which runs the forward itself"
            )

    @torch.inference_mode()
    def candidate_logits(self, queries: Sequence[Query], *, with_self: bool) -> torch.Tensor:
        """Return logits over the candidates, `[N, C]` float32 on the CPU."""
        logits, _ = dispatch_forward(self.model, **self.pad(queries))
        return candidate_logits(logits, self.vocab_size, with_self=with_self).cpu()

    def load_adapter(self, folder: Path) -> None:
        """Put a PEFT LoRA adapter on the backbone (the head is left alone).

        Raises:
            ExpertokenError: the adapter does not fit the model.
        """
        from peft import PeftModel

        try:
            adapted: Any = PeftModel.from_pretrained(self.model, folder).eval()
            self.model = adapted
        except Exception as error:  # PEFT raises ValueError, RuntimeError, KeyError, SafetensorError, ... alike
            raise ExpertokenError(
                f"{folder}: the adapter does not fit {self.source.model} ({one_line(error)})"
            ) from error
