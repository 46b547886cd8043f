# SPDX-License-Identifier: Apache-2.0
"""HPSv3: a Qwen2-VL with a head that was trained on people's choices, over a wide range of quality."""

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from .base import Reward
from .hpsv3_text import PLACE, load_text
from .models import find_file, from_weights, load_pretrained, read_weights
from .preprocessing import to_pil
from .qwen_chats import chat_inputs


# The head reads the score at this token, which the authors added to Qwen2-VL's.
REWARD_TOKEN = "<|Reward|>"
# Every image is brought to about so many pixels: 256 tokens of 28 x 28.
PIXELS = 256 * 28 * 28
# Names of transformers before 4.52, in which the weights were saved, and today's.
_RENAMED = ((r"(model\.)?visual\.", "visual."), (r"model\.(language_model\.)?", "language_model."))
_HEAD = "rm_head."


def split_weights(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    The weights of a `transformers.Qwen2VLModel` and of a [`MeanHead`]. What is not known keeps its name, so that loading
    reports it; the head that writes text is left out.
    """
    model, head = {}, {}
    for name, tensor in weights.items():
        if name.startswith(_HEAD):
            head[f"layers.{name.removeprefix(_HEAD)}"] = tensor
        elif name != "lm_head.weight":
            for pattern, replacement in _RENAMED:
                name, count = re.subn(f"^{pattern}", replacement, name)
                if count:
                    break
            model[name] = tensor
    return model, head


class MeanHead(nn.Module):
    """
    From a state of the language model to the mean of the score, which the paper takes to be normally distributed; a
    second output is about its deviation. In training there was dropout after the first activation.

    Args:
        width (`int`):
            Size of the state.
    """

    def __init__(self, width: int):
        super().__init__()
        # The place of the dropout keeps the names of the published weights: 0, 3, 5.
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layers(states)[..., 0]


class HPSv3Reward(Reward):
    """
    HPSv3 (https://huggingface.co/papers/2508.03789): about 10 for good images and below 0 for bad ones, without bounds.

    The published weights in transformers' Qwen2-VL. Two things are as in the authors' code and not as Qwen2-VL is used
    elsewhere: tokens of the image are numbered one after the other, like those of a text, and not by row and column; and
    the model reads the text that it was trained with, which is fetched from the authors' source (see `hpsv3_text.py`).

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"MizzenAI/HPSv3"`):
            The weights: a local file, or a folder or `owner/name[@revision]` with a `HPSv3.safetensors`.
        base_name_or_path (`str` or `Path`, *optional*, defaults to `"Qwen/Qwen2-VL-7B-Instruct"`):
            Config, tokenizer and image processor of the model that it was trained from: a local folder or
            `owner/name[@revision]`.
        text_path (`str` or `Path`, *optional*):
            A local copy of the file with the text, where it cannot be fetched.
        kwargs:
            `device`, `dtype` (by default `torch.bfloat16`; the head is in float32) and `batch_size` of
            [`~rewards.base.Reward`].
    """

    name = "hpsv3"
    batch_size = 8

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "MizzenAI/HPSv3",
        base_name_or_path: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        text_path: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(dtype=torch.bfloat16 if dtype is None else dtype, **kwargs)
        self.model_name_or_path = model_name_or_path
        self.base_name_or_path = base_name_or_path
        self.text_path = text_path

    def load_models(self) -> dict[str, Any]:
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        text = load_text(self.text_path)
        config, tokenizer, pixels = (
            load_pretrained(part, self.base_name_or_path, self.name)
            for part in (Qwen2VLConfig, AutoTokenizer, Qwen2VLImageProcessorPil)
        )
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        file = find_file(self.model_name_or_path, "HPSv3.safetensors", self.name)
        weights, head_weights = split_weights(read_weights(file))
        vocabulary = len(weights.get("language_model.embed_tokens.weight", ()))
        if vocabulary != len(tokenizer):
            raise ValueError(
                f"hpsv3: {file.name!r} has embeddings of {vocabulary} tokens, but the tokenizer of "
                f"{self.base_name_or_path} with {REWARD_TOKEN!r} has {len(tokenizer)}. Pass the model that it was trained "
                "from as `base_name_or_path`."
            )
        config.text_config.vocab_size = vocabulary
        model = from_weights(Qwen2VLModel, config, weights, self.name, dtype=self.dtype)
        head = MeanHead(config.text_config.hidden_size)
        head.load_state_dict(head_weights)
        return {"model": model, "head": head, "tokenizer": tokenizer, "pixels": pixels, "text": text}

    def _place(self) -> None:
        if self.models:
            # Not to `dtype`: this would round the frequencies of the rotary embedding, which loading keeps in float32.
            self.models["model"].to(self.device).eval().requires_grad_(False)
            self.models["head"].to(self.device, torch.float32).eval().requires_grad_(False)

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        model, tokenizer = self.models["model"], self.models["tokenizer"]
        pixels = self.models["pixels"](list(map(self._resized, to_pil(images))), do_resize=False, return_tensors="pt")
        # A token of the model in a prompt would be read as one.
        odd = [any(token in prompt for token in tokenizer.get_added_vocab()) for prompt in prompts]
        texts = [
            self.models["text"].replace(PLACE, "" if broken else prompt)
            for prompt, broken in zip(prompts, odd, strict=True)
        ]
        tokens = chat_inputs(tokenizer, model.config, pixels, texts, padding_side="right").to(model.device)
        count, length = tokens["input_ids"].shape
        states = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            # One after the other in time, row and column, the tokens of the image too.
            position_ids=torch.arange(length, device=model.device).expand(3, count, length),
            use_cache=False,
            **pixels.to(model.device),
        ).last_hidden_state
        read = tokens["input_ids"] == tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        scores = self.models["head"](states[read].float()).tolist()
        return [
            self.failed("the prompt holds a special token of the model", repr(prompt)) if broken else score
            for prompt, broken, score in zip(prompts, odd, scores, strict=True)
        ]

    def _resized(self, image: Image.Image) -> Image.Image:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        about = self.models["model"].config.vision_config
        factor = about.patch_size * about.spatial_merge_size
        height, width = smart_resize(image.height, image.width, factor, min_pixels=PIXELS, max_pixels=PIXELS)
        return image.resize((width, height), Image.Resampling.BICUBIC)
