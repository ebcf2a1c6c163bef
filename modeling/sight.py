"""How a model that sees reads conversations: its processor turns pictures into tokens and pixels."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import ExpertokenError, one_line, require_extra
from .locks import exclusive
from .pictures import Picture, parts_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_REFUSED = {"idefics3": "its processor takes the tokens of its own pictures for a user's"}
"""Families by model type that can't be read safely, and why."""


def sees(config: "PretrainedConfig") -> bool:
    """Return whether a model of this configuration reads pictures.

    Raises:
        ExpertokenError: it does, but is of a family that can't be read safely.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = config.model_type
    if kind in _REFUSED:
        raise ExpertokenError(f"models of the family {kind} are not read here: {_REFUSED[kind]}")
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config")


_Message = dict[str, Any]

_MEDIA_TOKENS = (
    "image_token", "video_token", "audio_token", "boi_token", "eoi_token", "fake_image_token", "global_image_token",
    "start_image_token", "end_image_token", "context_image_token", "vision_start_token", "vision_end_token",
)  # fmt: skip
"""What processors and tokenizers call the tokens of what is no text."""


class Sight:
    """The processor of a model that sees.

    Args:
        processor: with a tokenizer and a processor of images.

    Attributes:
        processor: the same.
        name: tells processors apart that give other pixels for the same picture.
        tokens: what stands for pictures in a text that a processor reads.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        settings = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
        kind = type(processor.image_processor).__name__
        self.name = f"{kind}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        named = [getattr(owner, name, None) for owner in (processor, processor.tokenizer) for name in _MEDIA_TOKENS]
        self.tokens = [token for token in dict.fromkeys(named) if isinstance(token, str) and token.strip()]
        self._lengths: dict[bytes, int] = {}

    @classmethod
    def from_pretrained(cls, where: str | Path, **options: Any) -> "Sight":
        """Load the processor of a model.

        Args:
            where: hub id or folder.
            **options: of `from_pretrained`.

        Raises:
            ExpertokenError: there is none, or it needs a package that is not installed.
            ImportError: the extra `vision` is not installed.
        """
        require_extra("PIL.Image", "vision")
        from transformers import AutoProcessor

        try:
            # By Pillow, whether torchvision is installed or not: the two give other pixels. `backend="pil"`, its newer
            # name, fails where there is a processor of videos, too.
            pillow = {"use_fast": False} if find_spec("torchvision") else {}
            processor = AutoProcessor.from_pretrained(where, **pillow, **options)
        except ImportError as error:
            raise ExpertokenError(
                f"{where}: its processor needs more than is installed here ({one_line(error)}); install "
                "expertoken[vision,torchvision]"
            ) from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ExpertokenError(f"{where}: its processor can't be loaded ({one_line(error)})") from error
        if getattr(processor, "image_processor", None) is None:
            raise ExpertokenError(f"{where}: expected a processor of images, found {type(processor).__name__}")
        return cls(processor)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The processor's tokenizer, which knows what sees for it."""
        tokenizer: Any = self.processor.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or self.processor.chat_template
        tokenizer.sight = self
        return tokenizer

    def conversation(self, messages: Sequence[_Message], pictures: Sequence[Picture]) -> list[_Message]:
        """Return messages as the processor's template takes them: in parts, with pictures where their marks stand.

        Args:
            messages: roles and marked texts; see `pictures.marked`.
            pictures: that the marks stand for.
        """
        return [
            {"role": message["role"], "content": [_part(part) for part in parts_of(message["content"], pictures)]}
            for message in messages
        ]

    def ids(self, conversation: Sequence[_Message], **options: Any) -> list[int]:
        """Return the token ids of a conversation up to its generation prompt, as many for each picture as it takes.

        Args:
            conversation: as `conversation` returns it.
            **options: of the chat template.

        Raises:
            ExpertokenError: the template or the processor refuses it.
        """
        return self._processed([conversation], **options)["input_ids"][0].tolist()

    def tokens_of(self, picture: Picture) -> int:
        """Return how many tokens a picture takes, about."""
        if (known := self._lengths.get(picture.key)) is not None:
            return known
        if len(self._lengths) > _REMEMBERED:
            self._lengths.clear()
        self._lengths[picture.key] = found = len(self.ids(_showing([picture]))) - self._frame
        return found

    @cached_property
    def _frame(self) -> int:
        """Tokens of a conversation that shows nothing, and says next to nothing."""
        return len(self.ids(_showing([])))

    def inputs(self, media: Sequence[Sequence[Picture]], ids: np.ndarray) -> dict[str, Any]:
        """Return what the model reads of a batch besides its token ids: pixels, and which tokens are of pictures.

        Of the whole batch at once: families differ in whether pixels have a dimension for it.

        Args:
            media: the pictures of each of N queries.
            ids: their padded token ids `[N, T]`.
        """
        found = self._processed(list(map(_showing, media)))
        shape = found["input_ids"].shape
        tensors = {key: value for key, value in found.items() if key not in ("input_ids", "attention_mask")}
        of_tokens = [key for key, value in tensors.items() if value.shape == shape]
        if of_tokens:
            tensors |= dict.fromkeys(of_tokens, torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist())))
        return tensors

    def _processed(self, conversations: Sequence[Sequence[_Message]], **options: Any) -> Any:
        from jinja2 import TemplateError

        # A copy with the pictures themselves: never a text of a user, which processors would open or fetch.
        shown = [[message | {"content": list(map(_shown, message["content"]))} for message in c] for c in conversations]
        tokenizer: Any = self.processor.tokenizer
        if tokenizer.pad_token_id is None:  # padding is not read here, but processors pad
            tokenizer.pad_token = tokenizer.eos_token
        try:
            with exclusive(tokenizer):
                found = self.processor.apply_chat_template(
                    shown,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    sanitize_control_tokens=True,
                    processor_kwargs={"padding": True, "return_tensors": "pt"},
                    **options,
                )
            return found.convert_to_tensors("pt")  # SmolVLM's gives arrays all the same
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, ZeroDivisionError, TemplateError) as error:
            raise ExpertokenError(
                f"{type(self.processor).__name__} refuses this conversation or a picture of it ({one_line(error)})"
            ) from error


_REMEMBERED = 10_000  # pictures whose lengths are known


def _part(part: str | Picture) -> _Message:
    return {"type": "image", "image": part} if isinstance(part, Picture) else {"type": "text", "text": part}


def _showing(pictures: Sequence[Any]) -> list[_Message]:
    """Return a conversation that shows pictures, and says next to nothing."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]


def _shown(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": part["image"].decoded()} if part["type"] == "image" else dict(part)
