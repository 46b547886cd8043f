# SPDX-License-Identifier: Apache-2.0
"""GenEval 2: is each atom of the prompt there? A vision-language model is asked, and its probability is the score."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import Reward
from .chat_server import ChatError, ChatServer, data_url
from .geneval2_rules import Question, arithmetic_mean, geometric_mean, parse_questions
from .models import load_pretrained
from .preprocessing import to_pil
from .qwen_chats import chat_inputs


METHODS = {"gm": geometric_mean, "am": arithmetic_mean}


class GenEval2Reward(Reward):
    """
    GenEval 2 (https://huggingface.co/papers/2512.16853), by Soft-TIFA: the mean over questions about the prompt's atoms
    of the probability that the judge's answer begins with the right word.

    The judge runs here, as in the published evaluation, or behind an OpenAI-compatible server that returns the
    probabilities of the 20 most probable tokens. An answer counts where it is a single token, which all are for Qwen's
    tokenizers but a number behind a space; of that, the published code counts the space.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"Qwen/Qwen3-VL-8B-Instruct"`):
            A Qwen3-VL, by default the judge of the published scores; with `base_url`, the name of a model on the server.
        base_url (`str`, *optional*):
            Address of an OpenAI-compatible server, as `http://localhost:8000/v1`. Images are sent there, with
            `batch_size` questions at once. By default the model runs here.
        api_key_env (`str`, *optional*):
            Name of the environment variable that holds the server's key.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for the server's answer.
        max_retries (`int`, *optional*, defaults to `4`):
            How often a request is repeated where the server is busy, broken or silent.
        method (`str`, *optional*, defaults to `"gm"`):
            The mean: `"gm"`, the geometric one, which is about whole prompts, or `"am"`, the arithmetic one, which is
            about atoms and still tells images apart of which one atom is missing.
        kwargs:
            `device`, `dtype` (by default `torch.bfloat16`) and `batch_size` of [`~rewards.base.Reward`].

    The dataset needs a column `vqa_list` with pairs of a question and its answer, see
    [`~rewards.geneval2_rules.parse_questions`]. `parts` are the probabilities, in the order of the questions.
    """

    name = "geneval2"
    columns_needed = ("vqa_list",)
    batch_size = 8

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "Qwen/Qwen3-VL-8B-Instruct",
        base_url: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        method: str = "gm",
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(dtype=torch.bfloat16 if dtype is None else dtype, **kwargs)
        if method not in METHODS:
            raise ValueError(f"`method` must be {' or '.join(map(repr, METHODS))}, but is {method!r}.")
        self.model_name_or_path = model_name_or_path
        self.server = base_url and ChatServer(
            base_url, str(model_name_or_path), api_key_env=api_key_env, timeout=timeout, max_retries=max_retries
        )
        self.method = method

    def load_models(self) -> dict[str, Any]:
        if self.server:
            self.server.check()
            return {"server": self.server}
        from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        def load(part: Any, **options: Any) -> Any:
            return load_pretrained(part, self.model_name_or_path, self.name, **options)

        return {
            "model": load(Qwen3VLForConditionalGeneration, dtype=self.dtype),
            "tokenizer": load(AutoTokenizer),
            "pixels": load(Qwen2VLImageProcessorPil),
        }

    def _place(self) -> None:
        # Not to `dtype`: this would round the frequencies of the rotary embedding, which loading keeps in float32.
        if "model" in self.models:
            self.models["model"].to(self.device).eval().requires_grad_(False)

    def score(
        self, images: torch.Tensor, prompts: list[str], *, vqa_list: list[str | Sequence[Sequence[str]]]
    ) -> list[float]:
        asked = [parse_questions(pairs) for pairs in vqa_list]
        found = (self._ask_server if self.server else self._ask_model)(to_pil(images), asked)
        whole = [not any(map(math.isnan, values)) for values in found]
        self.parts += [values if complete else None for values, complete in zip(found, whole, strict=True)]
        mean = METHODS[self.method]
        return [mean(values) if complete else math.nan for values, complete in zip(found, whole, strict=True)]

    def _ask_server(self, images: list[Image.Image], asked: list[list[Question]]) -> list[list[float]]:
        with ThreadPoolExecutor(self.batch_size, thread_name_prefix=self.name) as pool:
            urls = list(pool.map(data_url, images))
            jobs = [
                [pool.submit(self._probability, url, question) for question in questions]
                for url, questions in zip(urls, asked, strict=True)
            ]
            return [[job.result() for job in own] for own in jobs]

    def _probability(self, url: str, question: Question) -> float:
        try:
            tokens = self.server.first_tokens(url, question.text)
        except ChatError as error:
            return self.failed("the server gave no answer", error)
        return math.fsum(tokens.get(answer, 0.0) for answer in question.answers)

    def _ask_model(self, images: list[Image.Image], asked: list[list[Question]]) -> list[list[float]]:
        return [self._probabilities(image, questions) for image, questions in zip(images, asked, strict=True)]

    def _probabilities(self, image: Image.Image, questions: list[Question]) -> list[float]:
        model, tokenizer = self.models["model"], self.models["tokenizer"]
        pixels = self.models["pixels"]([image] * len(questions), return_tensors="pt")
        texts = [question.text for question in questions]
        inputs = chat_inputs(tokenizer, model.config, pixels, texts, padding_side="left").to(model.device)
        logits = model(**inputs, **pixels.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
        return [
            row[self._tokens(question)].sum().item()
            for row, question in zip(logits.double().softmax(-1), questions, strict=True)
        ]

    def _tokens(self, question: Question) -> list[int]:
        encoded = [self.models["tokenizer"].encode(answer, add_special_tokens=False) for answer in question.answers]
        tokens = list(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))
        if not tokens:
            raise ValueError(
                f"geneval2: none of {question.answers} is a token of the judge. Use a Qwen3-VL as the judge."
            )
        return tokens
