# SPDX-License-Identifier: Apache-2.0
"""What the rewards on Qwen's vision-language models share: chats about images, as their tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def chat_inputs(
    tokenizer: Any,
    config: Any,
    pixels: Mapping[str, torch.Tensor],
    texts: Sequence[str],
    *,
    padding_side: str,
) -> Any:
    """
    One chat for each image: the user's turn, with the image in front of a text, and the beginning of the answer.

    Not by `AutoProcessor`, which cannot be built without torchvision.

    Args:
        tokenizer:
            The model's, with a chat template.
        config ([`~transformers.PreTrainedConfig`]):
            The model's.
        pixels (`Mapping[str, torch.Tensor]`):
            What the image processor made of B images; `image_grid_thw` `[B, 3]` tells how many tokens each becomes.
        texts (`Sequence[str]`):
            B texts.
        padding_side (`str`):
            `"left"` to go on with the chats, or `"right"`.

    Returns:
        [`~transformers.BatchEncoding`]: `input_ids`, `attention_mask` and `mm_token_type_ids` `[B, L]`, without the last
        of which the model gives no positions in two dimensions to the tokens of an image.
    """
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    # One token for each square of patches that the model merges.
    numbers = pixels["image_grid_thw"].prod(-1) // config.vision_config.spatial_merge_size**2
    chats = []
    for text, number in zip(texts, numbers.tolist(), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        chats.append(chat.replace(token, token * number, 1))
    inputs = tokenizer(chats, padding=True, padding_side=padding_side, return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return inputs
