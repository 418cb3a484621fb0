"""From the options of prompt extension to its deployment: which models it needs, and its secrets.

Owns the rules of `prompt_extension` in the config file, as resolve.py owns those of the rest. Pure:
the environment comes as an argument. Every ValueError is one line that names the option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from serve_app.resolve import stage_options
from serve_app.topology import PromptExtenderGroups
from wan_model.config import WanConfig

if TYPE_CHECKING:
    from serve_app.config import PromptExtensionConfig

WHERE = "prompt_extension"
DEFAULT_CHECKPOINTS = {
    "local_qwen": ("Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "dashscope": ("qwen-plus", "qwen-vl-max"),
}
"""By backend: for text, and for text with a picture."""


def prompt_extender(
    config: PromptExtensionConfig, served: Iterable[WanConfig], environ: Mapping[str, str]
) -> PromptExtenderGroups | None:
    """None when it is off. Only the language models that some served model can need are named."""
    if config.backend == "off":
        if idle := sorted(config.model_fields_set - {"backend"}):
            raise ValueError(f"{WHERE}.{idle[0]} has no effect while {WHERE}.backend is off")
        return None
    served = list(served)
    checkpoint, vl_checkpoint = DEFAULT_CHECKPOINTS[config.backend]
    if config.checkpoint != "auto":
        checkpoint = config.checkpoint
    if config.vl_checkpoint != "auto":
        vl_checkpoint = config.vl_checkpoint
    if all(model.needs_image for model in served):
        _refuse_if_stated(config, "checkpoint", "every served model needs an image")
        checkpoint = None
    if not any(model.accepts_image for model in served):
        _refuse_if_stated(config, "vl_checkpoint", "no served model takes an image")
        vl_checkpoint = None
    if config.timeout_s >= config.step_timeout_s:
        raise ValueError(
            f"{WHERE}: timeout_s {config.timeout_s:g} >= step_timeout_s {config.step_timeout_s:g},"
            " at which the worker is given up"
        )
    options = stage_options(WHERE, config)
    api_key, api_url = "", None
    if config.backend == "dashscope":
        for option in ("num_gpus", "dtype"):
            if getattr(config, option):
                _refuse_if_stated(config, option, "DashScope computes elsewhere")
        api_key, api_url = _dashscope_key(environ), environ.get("DASH_API_URL") or None
        options |= {"num_gpus": 0.0, "device": "cpu", "dtype": "float32"}
    return PromptExtenderGroups(
        name="PromptExtender",
        checkpoint=checkpoint,
        vl_checkpoint=vl_checkpoint,
        revision=None,
        num_workers=1,
        backend=config.backend,
        target_language=config.target_language,
        timeout_s=config.timeout_s,
        max_wait_s=config.max_wait_s,
        max_new_tokens=config.max_new_tokens,
        api_key=api_key,
        api_url=api_url,
        **options,
    )


def _refuse_if_stated(config: PromptExtensionConfig, option: str, because: str) -> None:
    if config.has(option):
        raise ValueError(f"{WHERE}.{option} has no effect: {because}")


def _dashscope_key(environ: Mapping[str, str]) -> str:
    key = environ.get("DASH_API_KEY", "").strip()
    if not key:
        raise ValueError(f"{WHERE}.backend dashscope needs DASH_API_KEY in the environment")
    return key
