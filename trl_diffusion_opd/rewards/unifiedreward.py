# SPDX-License-Identifier: Apache-2.0
"""UnifiedReward: a vision-language model grades image and caption in words, and its number is read from these."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import Reward
from .chat_server import ChatError, ChatServer
from .models import load_pretrained
from .preprocessing import to_pil
from .qwen_chats import chat_inputs


# The longest answers list the elements of a caption one by one.
MAX_NEW_TOKENS = 512
IMAGE_SIZE = 512
MAX_SCORE = 5.0
INSTRUCTION = """An image was made from a text caption. Judge the image in two respects:
1. Caption: does it show what the caption says? Look at the objects, their number, attributes and relations.
2. Quality: is it well made? Look at sharpness, detail, colors and beauty.
First go through the elements of the caption, one per line, as 'element (type): 1' if the image shows it and \
'element (type): 0' if not. Then give one number from 1 (very bad) to 5 (excellent) for both respects together, after \
the words 'Final Score:'.
Text Caption: [{prompt}]"""
# Models put stars or brackets around either part.
FINAL_SCORE = re.compile(r"Final Score[*\s]*:[*\s\[]*(\d+(?:\.\d+)?)", re.IGNORECASE)


def parse_score(answer: str) -> float | None:
    """The number after "Final Score:" (the last one, if there are several); `None` if it is missing or not 1 to 5."""
    numbers = FINAL_SCORE.findall(answer)
    score = float(numbers[-1]) if numbers else None
    return score if score is not None and 1 <= score <= MAX_SCORE else None


class UnifiedRewardReward(Reward):
    """
    UnifiedReward (https://huggingface.co/papers/2503.05236): an answer of 1 to 5, divided by 5.

    The model runs here or behind an OpenAI-compatible server. The published numbers are of `UnifiedReward-7b-v1.5`,
    which transformers cannot load, told what to look at by the authors' instruction; here the instruction is in our own
    words. With another model or instruction scores do not compare with published ones.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"CodeGoat24/UnifiedReward-qwen-7b"`):
            A Qwen2.5-VL; with `base_url`, the name of the model on the server.
        base_url (`str`, *optional*):
            Address of an OpenAI-compatible server, as `http://localhost:8000/v1`. Images are sent there, `batch_size`
            at once. By default the model runs here.
        api_key_env (`str`, *optional*):
            Name of the environment variable that holds the server's key.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for the server's answer.
        max_retries (`int`, *optional*, defaults to `4`):
            How often a request is repeated where the server is busy, broken or silent.
        instruction (`str`, *optional*):
            What the model is told, with `{prompt}` in the place of the caption. The answer must hold "Final Score:"
            and a number.
        max_new_tokens (`int`, *optional*, defaults to 512):
            Longest answer.
        kwargs:
            `device`, `dtype` (by default `torch.bfloat16`) and `batch_size` of [`~rewards.base.Reward`].
    """

    name = "unifiedreward"
    table_factor = MAX_SCORE
    batch_size = 8

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "CodeGoat24/UnifiedReward-qwen-7b",
        base_url: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        instruction: str = INSTRUCTION,
        max_new_tokens: int = MAX_NEW_TOKENS,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(dtype=torch.bfloat16 if dtype is None else dtype, **kwargs)
        if "{prompt}" not in instruction:
            raise ValueError("`instruction` has no `{prompt}`, the place of the caption.")
        self.model_name_or_path = model_name_or_path
        self.server = base_url and ChatServer(
            base_url, str(model_name_or_path), api_key_env=api_key_env, timeout=timeout, max_retries=max_retries
        )
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens

    def load_models(self) -> dict[str, Any]:
        if self.server:
            self.server.check()
            return {"server": self.server}
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        def load(part: Any, **options: Any) -> Any:
            return load_pretrained(part, self.model_name_or_path, self.name, **options)

        return {
            "model": load(Qwen2_5_VLForConditionalGeneration, dtype=self.dtype),
            "tokenizer": load(AutoTokenizer),
            "pixels": load(Qwen2VLImageProcessorPil),
        }

    def _place(self) -> None:
        # Not to `dtype`: this would round the frequencies of the rotary embedding, which loading keeps in float32.
        if "model" in self.models:
            self.models["model"].to(self.device).eval().requires_grad_(False)

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        resized = [image.resize((IMAGE_SIZE, IMAGE_SIZE)) for image in to_pil(images)]
        texts = [self.instruction.replace("{prompt}", prompt) for prompt in prompts]
        if self.server:
            with ThreadPoolExecutor(len(texts), thread_name_prefix=self.name) as pool:
                return list(pool.map(self._ask, resized, texts))
        return [self._read(answer) for answer in self._generate(resized, texts)]

    def _ask(self, image: Image.Image, text: str) -> float:
        try:
            return self._read(self.server.ask(image, text, max_tokens=self.max_new_tokens))
        except ChatError as error:
            return self.failed("the server gave no answer", error)

    def _read(self, answer: str) -> float:
        score = parse_score(answer)
        if score is None:
            return self.failed("there is no score of 1 to 5 in the answer", repr(answer[-200:]))
        return score / MAX_SCORE

    def _generate(self, images: list[Image.Image], texts: list[str]) -> list[str]:
        model, tokenizer = self.models["model"], self.models["tokenizer"]
        pixels = self.models["pixels"](images, return_tensors="pt")
        tokens = chat_inputs(tokenizer, model.config, pixels, texts, padding_side="left")
        length = tokens["input_ids"].shape[1]
        answers = model.generate(
            **tokens.to(model.device),
            **pixels.to(model.device),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        return tokenizer.batch_decode(answers[:, length:], skip_special_tokens=True)
