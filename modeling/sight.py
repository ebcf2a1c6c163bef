"""Processors of models that read pictures, which turn the pictures of conversations into tokens and pixels."""

import hashlib
import json
from collections.abc import Callable, Sequence
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

_REFUSED = {"idefics3": "its processor mistakes the tokens of its own pictures for a user's text"}
"""Families by model type that can't be used safely, and the reason."""


def sees(config: "PretrainedConfig") -> bool:
    """Check whether a model with this configuration reads pictures.

    Raises:
        ExpertokenError: The model reads pictures, but its family can't be used safely.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = config.model_type
    if kind in _REFUSED:
        raise ExpertokenError(f"models of the family {kind} are not supported: {_REFUSED[kind]}. Use another model")
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config")


_Message = dict[str, Any]

_MEDIA_TOKENS = (
    "image_token", "video_token", "audio_token", "boi_token", "eoi_token", "fake_image_token", "global_image_token",
    "start_image_token", "end_image_token", "context_image_token", "vision_start_token", "vision_end_token",
)  # fmt: skip
"""Attributes of processors and tokenizers that hold the tokens of pictures and other media."""


class Sight:
    """The picture processor of a model that reads pictures.

    Args:
        processor: Processor of transformers, with a tokenizer and an image processor.

    Attributes:
        processor: Processor of transformers, with a tokenizer and an image processor.
        name: Name that differs between processors that give different pixels for the same picture.
        tokens: Tokens that represent pictures in the text that a processor reads.
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
            where: Hub id or folder of the model.
            **options: Further options of `from_pretrained`.

        Raises:
            ExpertokenError: The model has no processor, or the processor needs a package that is not installed.
            ImportError: The extra `vision` is not installed.
        """
        require_extra("PIL.Image", "vision")
        from transformers import AutoProcessor

        try:
            # Pillow is used even if torchvision is installed, because the two give different pixels. The newer option
            # `backend="pil"` fails for models that have a processor of videos too.
            pillow = {"use_fast": False} if find_spec("torchvision") else {}
            processor = AutoProcessor.from_pretrained(where, **pillow, **options)
        except ImportError as error:
            raise ExpertokenError(
                f"{where}: its processor needs a package that is not installed ({one_line(error)}). Install "
                "expertoken[vision,torchvision]"
            ) from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ExpertokenError(f"{where}: its processor can't be loaded ({one_line(error)})") from error
        if getattr(processor, "image_processor", None) is None:
            raise ExpertokenError(f"{where}: expected a processor of images, got {type(processor).__name__}")
        return cls(processor)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Tokenizer of the processor, which carries this object as its attribute `sight`."""
        tokenizer: Any = self.processor.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or self.processor.chat_template
        tokenizer.sight = self
        return tokenizer

    def conversation(self, messages: Sequence[_Message], pictures: Sequence[Picture]) -> list[_Message]:
        """Return messages in the form of the processor's template: in parts, with pictures in place of their marks.

        Args:
            messages: Messages with roles and marked texts. See `pictures.marked`.
            pictures: Pictures of the marks.
        """
        return [
            {"role": message["role"], "content": [_part(part) for part in parts_of(message["content"], pictures)]}
            for message in messages
        ]

    def ids(self, conversation: Sequence[_Message], **options: Any) -> list[int]:
        """Return the token ids of a conversation up to its generation prompt, including all tokens of each picture.

        Args:
            conversation: Messages as the method `conversation` returns them.
            **options: Further options of the chat template.

        Raises:
            ExpertokenError: The template or the processor refuses the conversation.
        """
        # The number of a picture's tokens depends on its size alone, so nothing is decoded.
        return self._processed([conversation], Picture.blank, **options)["input_ids"][0].tolist()

    def tokens_of(self, picture: Picture) -> int:
        """Return the approximate number of a picture's tokens."""
        if (known := self._lengths.get(picture.key)) is not None:
            return known
        if len(self._lengths) > _REMEMBERED:
            self._lengths.clear()
        self._lengths[picture.key] = found = len(self.ids(_showing([picture]))) - self._frame
        return found

    @cached_property
    def _frame(self) -> int:
        """Number of tokens of a conversation without pictures and with a minimal text."""
        return len(self.ids(_showing([])))

    def inputs(self, media: Sequence[Sequence[Picture]], ids: np.ndarray) -> dict[str, Any]:
        """Return the model's inputs of a batch besides its token ids: pixels, and the types of tokens.

        The whole batch is processed at once, because pixels have a batch dimension in some families only.

        Args:
            media: Pictures of each of N queries.
            ids: Padded token ids of the queries, `[N, T]`.
        """
        found = self._processed(list(map(_showing, media)), Picture.decoded)
        shape = found["input_ids"].shape
        tensors = {key: value for key, value in found.items() if key not in ("input_ids", "attention_mask")}
        of_tokens = [key for key, value in tensors.items() if value.shape == shape]
        if of_tokens:
            tensors |= dict.fromkeys(of_tokens, torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist())))
        return tensors

    def _processed(
        self, conversations: Sequence[Sequence[_Message]], image: Callable[[Picture], Any], **options: Any
    ) -> Any:
        from jinja2 import TemplateError

        # Only decoded pictures are passed on. Processors would open or fetch a user's text in their place.
        def shown(part: dict[str, Any]) -> dict[str, Any]:
            return {"type": "image", "image": image(part["image"])} if part["type"] == "image" else dict(part)

        tokenizer: Any = self.processor.tokenizer
        if tokenizer.pad_token_id is None:  # processors pad, though the padding is never read
            tokenizer.pad_token = tokenizer.eos_token
        try:
            with exclusive(tokenizer):
                found = self.processor.apply_chat_template(
                    [
                        [message | {"content": list(map(shown, message["content"]))} for message in c]
                        for c in conversations
                    ],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    sanitize_control_tokens=True,
                    processor_kwargs={"padding": True, "return_tensors": "pt"},
                    **options,
                )
            return found.convert_to_tensors("pt")  # SmolVLM's processor ignores return_tensors and returns arrays
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, ZeroDivisionError, TemplateError) as error:
            raise ExpertokenError(
                f"{type(self.processor).__name__} refuses this conversation or a picture of it ({one_line(error)})"
            ) from error


_REMEMBERED = 10_000  # limit on the pictures whose lengths are cached


def _part(part: str | Picture) -> _Message:
    return {"type": "image", "image": part} if isinstance(part, Picture) else {"type": "text", "text": part}


def _showing(pictures: Sequence[Any]) -> list[_Message]:
    """Return a conversation with pictures and a minimal text."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
