"""Tiny vision-language models of each family, with processors, made in the process: random, with two layers."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t

from expertoken.tests.tiny import _SIZES, tiny_tokenizer

_TEMPLATE = (
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] + '\n' }}}}{{% for p in m['content'] %}}"
    "{{% if p['type'] == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}{{% endfor %}}"
    "{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)

PILLOW_ALONE = ("llava", "gemma3")
FAMILIES = (*PILLOW_ALONE, "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")


def _tokenizer(tokens: list[str], **named: str) -> Any:
    base = tiny_tokenizer()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(base.backend_tokenizer),
        eos_token=base.eos_token,
        pad_token=base.pad_token,
        extra_special_tokens=named,
    )
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


_TEXT: dict[str, Any] = _SIZES | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
_SQUARE = {"height": 28, "width": 28}


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer(["<image>"], image_token="<image>")
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_TOWER),
        text_config=t.LlamaConfig(**_TEXT),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(size=_SQUARE, crop_size=_SQUARE),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.format(image="<image>"),
    )
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(list(named.values()), **named)
    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**_TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=64),
        vision_config=t.SiglipVisionConfig(**_TOWER),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = t.Gemma3Processor(
        image_processor=t.Gemma3ImageProcessor(size=_SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_TEMPLATE.format(image="<start_of_image>"),
    )
    return config, processor


def _qwen(config: Any, processor: Any, tower: dict[str, Any], text: dict[str, Any], video: Any) -> tuple[Any, Any]:
    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(tokens, image_token="<|image_pad|>", video_token="<|video_pad|>")
    start, end, image, film = tokenizer.convert_tokens_to_ids(tokens)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    made = config(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "patch_size": 14} | tower,
        text_config=_TEXT | {"rope_parameters": rope} | text,
        image_token_id=image,
        video_token_id=film,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    sizes = {"patch_size": made.vision_config.patch_size, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    return made, processor(
        image_processor=t.Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=video(**sizes),
        chat_template=_TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen2_5_vl() -> tuple[Any, Any]:
    tower = {"intermediate_size": 64, "window_size": 56, "fullatt_block_indexes": [1]}
    return _qwen(t.Qwen2_5_VLConfig, t.Qwen2_5_VLProcessor, tower, {}, t.Qwen2VLVideoProcessor)


def _qwen3_vl() -> tuple[Any, Any]:
    tower = {"intermediate_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return _qwen(t.Qwen3VLConfig, t.Qwen3VLProcessor, tower, {"head_dim": 8}, t.Qwen3VLVideoProcessor)


def _smolvlm() -> tuple[Any, Any]:
    tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = _tokenizer(
        tokens, image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    config = t.SmolVLMConfig(
        vision_config=t.SmolVLMVisionConfig(**_TOWER).to_dict(),
        text_config=t.LlamaConfig(**_TEXT).to_dict(),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    edges = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    processor = t.SmolVLMProcessor(
        image_processor=t.SmolVLMImageProcessor(**edges),
        tokenizer=tokenizer,
        video_processor=t.SmolVLMVideoProcessor(**edges),
        image_seq_len=4,
        chat_template=_TEMPLATE.format(image="<image>"),
    )
    return config, processor


def _internvl() -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _tokenizer(list(named.values()), **named)
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**_TOWER | {"image_size": [28, 28], "patch_size": [7, 7]}),
        text_config=t.Qwen2Config(**_TEXT),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    processor = t.InternVLProcessor(
        image_processor=t.GotOcr2ImageProcessor(size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer=tokenizer,
        video_processor=t.InternVLVideoProcessor(size=_SQUARE),
        image_seq_length=4,
        chat_template=_TEMPLATE.format(image="<IMG_CONTEXT>"),
    )
    return config, processor


def seeing_model(family: str, seed: int = 0) -> t.PreTrainedModel:
    config, _ = globals()[f"_{family}"]()
    torch.manual_seed(seed)
    model = t.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the projector of a new Gemma 3 is zero
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1 and "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def seeing_folder(folder: Path, family: str) -> Path:
    """Write a tiny vision-language model with its processor."""
    seeing_model(family).save_pretrained(folder)
    globals()[f"_{family}"]()[1].save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    """Draw a picture of noise and return the bytes of its file."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
