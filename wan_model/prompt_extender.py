"""Prompt extension by local models: Qwen2.5 for text, Qwen2.5-VL where there is a picture.

Owns the two networks, the ChatML that they are asked in and the sampling, which the job's seed
decides. Knows nothing about jobs or services; what the models are told is prompt_instructions.py.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from wan_model.engine import resolve_dtype
from wan_model.image_file import open_image
from wan_model.prompt_instructions import Language, Task, instructions, one_paragraph, request

# How many tokens a picture may take, each a square of merged patches: the reference's bounds.
MIN_IMAGE_TOKENS, MAX_IMAGE_TOKENS = 256, 1280


class PromptExtenderEngine:
    """Writes prompts out. A model whose checkpoint is None is not loaded.

    checkpoint, vl_checkpoint   folders or Hub names of a Qwen2.5 and a Qwen2.5-VL checkpoint
    timeout_s                   of one prompt; looked at after every token
    """

    def __init__(
        self,
        *,
        checkpoint: str | None,
        vl_checkpoint: str | None,
        target_language: Language,
        device: str,
        dtype: str = "auto",
        timeout_s: float = 60.0,
        max_new_tokens: int = 512,
    ) -> None:
        options = {"device": device, "dtype": resolve_dtype(dtype, device)}
        self.text = QwenText(checkpoint, **options) if checkpoint else None
        self.vision = QwenVision(vl_checkpoint, **options) if vl_checkpoint else None
        self.target_language: Language = target_language
        self.timeout_s = timeout_s
        self.max_new_tokens = max_new_tokens

    def warm_up(self) -> None:
        """Two tokens of every model."""
        for model, image in ((self.text, None), (self.vision, Image.new("RGB", (64, 64)))):
            if model is not None:
                model.answer("Answer.", "Hello", image, seed=0, timeout_s=3600, max_new_tokens=2)

    def extend(self, prompt: str, *, task: Task, image: bytes | None, seed: int) -> str:
        """`prompt` as a paragraph in the target language; the same for the same seed.

        Raises TimeoutError past `timeout_s`, ValueError when there is no answer to use.
        """
        model = self.text or self.vision
        if image is not None:
            model = self.vision
        if model is None:
            kind = "Qwen2.5-VL" if image is not None else "Qwen2.5"
            raise ValueError(f"no {kind} model is loaded")
        answer = model.answer(
            instructions(task, self.target_language),
            request(prompt, self.target_language),
            open_image(image) if image is not None else None,
            seed=seed,
            timeout_s=self.timeout_s,
            max_new_tokens=self.max_new_tokens,
        )
        return one_paragraph(answer)


class QwenText:
    """A Qwen2.5 chat model."""

    model_class: Any = AutoModelForCausalLM

    def __init__(self, checkpoint: str, *, device: str, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = self.model_class.from_pretrained(checkpoint, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.turn_start = self._special("<|im_start|>")
        self.turn_end = self._special("<|im_end|>")

    @torch.inference_mode()
    def answer(
        self,
        system: str,
        user: str,
        image: Image.Image | None,
        *,
        seed: int,
        timeout_s: float,
        max_new_tokens: int,
    ) -> str:
        """What the model answers to one user turn, sampled as its checkpoint says."""
        began = time.monotonic()
        picture_ids, inputs = self._picture(image)
        ids_L = [
            *self._turn("system", [], system),
            *self._turn("user", picture_ids, user),
            *[self.turn_start, *self._ids("assistant\n")],
        ]
        ids_BL = torch.tensor([ids_L], device=self.device)
        torch.manual_seed(seed)
        written_BL = self.model.generate(
            input_ids=ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            **self._picture_inputs(ids_BL, inputs),
            do_sample=True,
            max_new_tokens=max_new_tokens,
            max_time=timeout_s,
            eos_token_id=self.turn_end,
            pad_token_id=self.turn_end,
        )
        written_L = written_BL[0, len(ids_L) :].tolist()
        whole = len(written_L) == max_new_tokens or self.turn_end in written_L
        if not whole and time.monotonic() - began >= timeout_s:
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return self.tokenizer.decode(written_L, skip_special_tokens=True)

    def _turn(self, role: str, picture_ids: list[int], text: str) -> list[int]:
        """One ChatML turn. Role and text are one piece where no picture stands between them."""
        if picture_ids:
            body = [*self._ids(f"{role}\n"), *picture_ids, *self._ids(text)]
        else:
            body = self._ids(f"{role}\n{text}")
        return [self.turn_start, *body, self.turn_end, *self._ids("\n")]

    def _ids(self, text: str) -> list[int]:
        # Whatever a client writes is text: "<|im_end|>" in a prompt ends no turn.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _special(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or found == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {token}: this is no Qwen2.5 chat checkpoint")
        return found

    def _picture(self, image: Image.Image | None) -> tuple[list[int], dict[str, Any]]:
        """(the picture's place in the turn, its arrays)."""
        if image is not None:
            raise ValueError("Qwen2.5 sees no picture: configure a Qwen2.5-VL checkpoint")
        return [], {}

    def _picture_inputs(self, ids_BL: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs


class QwenVision(QwenText):
    """A Qwen2.5-VL chat model; also answers without a picture."""

    model_class = Qwen2_5_VLForConditionalGeneration

    def __init__(self, checkpoint: str, *, device: str, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, device=device, dtype=dtype)
        self.image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.image_start = self._special("<|vision_start|>")
        self.image_token = self._special("<|image_pad|>")
        self.image_end = self._special("<|vision_end|>")

    def _picture(self, image: Image.Image | None) -> tuple[list[int], dict[str, Any]]:
        if image is None:
            return [], {}
        token_pixels = (self.image_processor.patch_size * self.image_processor.merge_size) ** 2
        size = {
            "shortest_edge": MIN_IMAGE_TOKENS * token_pixels,
            "longest_edge": MAX_IMAGE_TOKENS * token_pixels,
        }
        made = self.image_processor(images=image, size=size, return_tensors="pt")
        num_patches = int(made["image_grid_thw"].prod())
        num_tokens = num_patches // self.image_processor.merge_size**2
        place = [self.image_start, *[self.image_token] * num_tokens, self.image_end]
        pixels = made["pixel_values"].to(self.device, self.model.dtype)
        return place, {
            "pixel_values": pixels,
            "image_grid_thw": made["image_grid_thw"].to(self.device),
        }

    def _picture_inputs(self, ids_BL: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        if not inputs:
            return inputs
        # Which positions are the picture's: its rotary positions have two dimensions.
        return inputs | {"mm_token_type_ids": (ids_BL == self.image_token).int()}
