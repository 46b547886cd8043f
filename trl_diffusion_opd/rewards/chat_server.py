# SPDX-License-Identifier: Apache-2.0
"""Asking a vision-language model behind an OpenAI-compatible server, such as vLLM or SGLang, about an image."""

import base64
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from PIL import Image


# Busy, or broken for the moment.
RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
# The most that servers return.
TOP_TOKENS = 20
# The server will refuse every request.
FATAL_STATUS = (301, 302, 303, 307, 308, 401, 403, 404, 405)
FIRST_DELAY = 0.25


class ChatError(RuntimeError):
    """The server gave no answer to one request."""


class ChatServerError(RuntimeError):
    """The server cannot be used as it was set up. `status` is the one of HTTP, if it answered."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


def data_url(image: Image.Image) -> str:
    """An image as servers take it: a PNG in an address."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # `urllib` would send the key along to wherever the server points.
    def redirect_request(self, *args: Any) -> None:
        return None


class ChatServer:
    """
    A model behind an OpenAI-compatible server. May be used by several threads.

    Not `huggingface_hub.InferenceClient`: that one follows redirects, within a host with the key and to another host with
    the image, and without a key it sends the user's token of the Hub.

    Args:
        base_url (`str`):
            Address up to and with the version, as `http://localhost:8000/v1`.
        model (`str`):
            Name of the model on the server.
        api_key_env (`str`, *optional*):
            Name of the environment variable that holds the key. Nothing is sent without it.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `4`):
            How often a request is repeated where the server is busy, broken or silent.
        sleep (`Callable[[float], None]`, *optional*, defaults to `time.sleep`):
            What waits before a request is repeated, given the seconds.

    Raises:
        `ValueError`: an address without `http`, or a variable that is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` must start with `http://` or `https://`, but is {base_url!r}.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(
                f"`api_key_env` names the environment variable {api_key_env!r}, which is not set. Put the key there."
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.max_retries = max_retries
        self.sleep = sleep
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """
        Raises a [`ChatServerError`] if the server cannot be reached or does not have the model. A server that does not
        list its models is believed to have it.
        """
        try:
            listing = self._request("/models")
        except ChatError as error:
            raise ChatServerError(f"{error}. Is a server running at {self.base_url}?") from error
        except ChatServerError as error:
            if error.status in (404, 405):
                return
            raise
        try:
            names = [entry["id"] for entry in listing["data"]]
        except (LookupError, TypeError):
            return
        if self.model not in names:
            raise ChatServerError(f"The server at {self.base_url} has no model {self.model!r}. It has {names}.")

    def ask(self, image: Image.Image, text: str, *, max_tokens: int) -> str:
        """
        The answer to a text about an image, at temperature 0.

        Raises:
            `ChatError`: there is no answer to this request.
            `ChatServerError`: there will be none to any.
        """
        answer = self._chat(data_url(image), text, max_tokens=max_tokens)
        try:
            return str(answer["choices"][0]["message"]["content"])
        except (LookupError, TypeError) as error:
            raise ChatError("the server's answer holds no message") from error

    def first_tokens(self, url: str, text: str) -> dict[str, float]:
        """
        The probabilities of the tokens that an answer to a text about an image may begin with, the 20 most probable ones.

        Args:
            url (`str`):
                The image, from [`data_url`].
            text (`str`):
                The text.

        Raises:
            `ChatError`: there is no answer to this request.
            `ChatServerError`: there will be none to any, such as where the server returns no probabilities.
        """
        answer = self._chat(url, text, max_tokens=1, logprobs=True, top_logprobs=TOP_TOKENS)
        probabilities: dict[str, float] = {}
        try:
            choice = answer["choices"][0]
            entries = [
                (entry["token"], entry["logprob"]) for entry in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
            for token, logarithm in entries:
                probabilities[token] = probabilities.get(token, 0.0) + math.exp(logarithm)
        except (LookupError, TypeError) as error:
            raise ChatServerError(
                f"The server at {self.base_url} returns no probabilities of tokens (`top_logprobs`). Use one that does, "
                "such as vLLM."
            ) from error
        return probabilities

    def _chat(self, url: str, text: str, **options: Any) -> Any:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self._request(
            "/chat/completions", {"model": self.model, "messages": messages, "temperature": 0, **options}
        )

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, headers)
        for attempt in range(self.max_retries + 1):
            if attempt:
                self.sleep(FIRST_DELAY * 2 ** (attempt - 1))
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"the server answered {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code in FATAL_STATUS:
                    raise ChatServerError(
                        f"{self.base_url}{path}: {problem}. Check the address, the model and the key.", error.code
                    ) from None
                if error.code not in RETRIED_STATUS:
                    break
            except (OSError, HTTPException) as error:  # `URLError` and timeouts are `OSError`s
                problem = f"the server did not answer ({getattr(error, 'reason', error) or type(error).__name__})"
            except ValueError:
                problem = "the server's answer is not JSON"
        raise ChatError(problem)
