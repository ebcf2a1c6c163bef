"""Small vision-language model made of SmolLM2, a random vision tower and a random projector.

No part of it was trained on pictures. The expert rows need only that different kinds of pictures give different states,
and this example shows only that. The model's own answers about pictures are meaningless.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from expertoken.modeling.loading import load_causal_lm
from expertoken.modeling.source import Source

from ..smollm2 import smollm2

IMAGE = "<image>"
SIDE, PATCH = 56, 14
TOWER: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write the model and its processor.

    Args:
        folder: Folder to write.
        seed: Seed of the weights of the tower and the projector.

    Returns:
        The folder.
    """
    loaded: tuple[Any, Any] = load_causal_lm(Source(str(smollm2())), device="cpu")
    language, tokenizer = loaded
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=language.config,
        image_token_index=int(tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model: Any = LlavaForConditionalGeneration(config).float()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    _scale_projector(model)
    model.generation_config = language.generation_config
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


@torch.inference_mode()
def _scale_projector(model: Any) -> None:
    """Scale the projector, so that pictures and text have embeddings of the same root mean square.

    The language model expects embeddings of that size. The last bias becomes zero.
    """
    noise = torch.randn(4, 3, SIDE, SIDE)
    seen = torch.cat(list(model.get_image_features(pixel_values=noise).pooler_output))
    text = model.get_input_embeddings().weight.square().mean().sqrt()
    last = model.model.multi_modal_projector.linear_2
    last.weight *= text / seen.square().mean().sqrt()
    last.bias.zero_()
