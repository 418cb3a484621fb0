"""Prompt extension by DashScope, Alibaba Cloud's model service, through its own SDK.

Owns the calls, their retries and their deadline. The SDK is an optional extra and imported only
here, when an engine is made. Knows nothing about jobs; what the models are told is
prompt_instructions.py.
"""

from __future__ import annotations

import base64
import time
from io import BytesIO
from typing import Any

from PIL import Image

from wan_model.image_file import open_image
from wan_model.prompt_instructions import Language, Task, instructions, one_paragraph, request

MAX_TRIES = 4
RETRY_DELAY_S = 0.5
MAX_IMAGE_AREA = 512 * 512  # larger pictures are shrunk: more says nothing more about motion
SEEDS = 2**31  # DashScope's seeds are 31-bit


class DashScopeExtenderEngine:
    """Writes prompts out. `checkpoint`, `vl_checkpoint`: names of DashScope's models.

    `api_url`: the service's base URL; None is the SDK's own. `timeout_s` bounds all tries together.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None,
        vl_checkpoint: str | None,
        target_language: Language,
        api_key: str,
        api_url: str | None = None,
        timeout_s: float = 60.0,
        max_new_tokens: int = 512,
    ) -> None:
        try:
            import dashscope
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "prompt extension by DashScope needs its SDK: pip install 'wan-serve[dashscope]'"
            ) from error
        self.sdk = dashscope
        self.checkpoint = checkpoint
        self.vl_checkpoint = vl_checkpoint
        self.target_language: Language = target_language
        self.timeout_s = timeout_s
        self.options: dict[str, Any] = {"api_key": api_key, "max_tokens": max_new_tokens}
        if api_url is not None:
            self.options["base_address"] = api_url

    def warm_up(self) -> None:
        """Nothing: a call would cost money, and a failing one only costs a job its extension."""

    def extend(self, prompt: str, *, task: Task, image: bytes | None, seed: int) -> str:
        """`prompt` as a paragraph in the target language. DashScope does not promise the same
        answer for the same seed, but tries.

        Raises TimeoutError past `timeout_s`, ValueError when there is no answer to use.
        """
        system = instructions(task, self.target_language)
        user = request(prompt, self.target_language)
        if image is None:
            call, model = self.sdk.Generation.call, self.checkpoint
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
            ]
            more = {"result_format": "message"}
        else:
            call, model = self.sdk.MultiModalConversation.call, self.vl_checkpoint
            messages = [
                {"role": "system", "content": [{"text": system}]},
                {"role": "user", "content": [{"image": data_uri(image)}, {"text": user}]},
            ]
            more = {}
        if model is None:
            raise ValueError("no model is configured for this kind of prompt")
        answer = self._answer(call, model=model, messages=messages, seed=seed % SEEDS, **more)
        return one_paragraph(text_of(answer))

    def _answer(self, call: Any, **kwargs: Any) -> Any:
        """The first successful answer of at most MAX_TRIES, all before the deadline."""
        deadline = time.monotonic() + self.timeout_s
        failure = ""
        for tried in range(MAX_TRIES):
            if tried:
                delay_s = RETRY_DELAY_S * 2 ** (tried - 1)
                time.sleep(max(0.0, min(delay_s, deadline - time.monotonic())))
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                answer = call(**kwargs, **self.options, request_timeout=left_s)
            except Exception as error:  # what the SDK's HTTP client raises is not documented
                failure = type(error).__name__
            else:
                if answer.status_code == 200:
                    return answer
                failure = f"{answer.status_code} {answer.code}".strip()
                if answer.status_code != 429 and answer.status_code < 500:
                    break  # refused: it would be refused again
        if time.monotonic() >= deadline:
            raise TimeoutError(f"DashScope gave no answer within {self.timeout_s:g} s")
        raise ValueError(f"DashScope did not answer ({failure})")


def text_of(answer: Any) -> str:
    """The text of an answer of either kind of model."""
    try:
        content = answer.output.choices[0].message.content
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("DashScope answered without a message") from error
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def data_uri(image: bytes) -> str:
    """The picture as a JPEG of at most MAX_IMAGE_AREA pixels."""
    picture = open_image(image)
    area = picture.width * picture.height
    if area > MAX_IMAGE_AREA:
        scale = (MAX_IMAGE_AREA / area) ** 0.5
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
