"""Prompt extension: the stage that writes prompts out, and the pipeline's step before encoding.

Owns what a job's prompt becomes: composed with its cinematography, extended at most once, or left
as it is when that fails, with a note. Knows nothing about language models (an engine in the group)
or about what is done with the prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from cluster.errors import GroupDead
from serve_app.cinematography import compose
from serve_app.job_schema import Job, is_storable
from serve_app.jobs import JobStore
from serve_app.stages import JobTicket, LeaseLost, Stage, StageResult
from serve_app.topology import PromptExtenderGroups

logger = logging.getLogger(__name__)

STAGE = "PromptExtender"
RETRY_DELAY_S = 0.5  # by then a replica whose group died is gone
ENGINES = {
    "local_qwen": "wan_model.prompt_extender:PromptExtenderEngine",
    "dashscope": "wan_model.dashscope_extender:DashScopeExtenderEngine",
}
"""By backend: what the group's worker runs."""

Call = Callable[..., Awaitable[tuple[Any, StageResult]]]
Progress = Callable[[str, int], Awaitable[None]]


class PromptExtender(Stage):
    """Prompts -> prompts that say more, through the group's language model."""

    async def extend(
        self, job: JobTicket, prompt: str, task: str, image: str | None
    ) -> StageResult:
        """`image`: an artifact key. Raises TimeoutError, or ValueError when there is no answer."""
        data = await self.artifacts.get(image) if image else None
        async with self.turns.place(job.rank):
            started_at = time.time()
            text = await self.group.call(
                "extend", prompt, task=task, image=data, seed=job.params["seed"]
            )
            report = self.report(started_at)
        return StageResult(report=report, artifacts={"revised_prompt": text})


def engine_of(groups: PromptExtenderGroups) -> tuple[str, dict[str, Any]]:
    """The engine's import string and its options."""
    kwargs = {
        "checkpoint": groups.checkpoint,
        "vl_checkpoint": groups.vl_checkpoint,
        "target_language": groups.target_language,
        "timeout_s": groups.timeout_s,
        "max_new_tokens": groups.max_new_tokens,
    }
    if groups.backend == "dashscope":
        kwargs |= {"api_key": groups.api_key, "api_url": groups.api_url}
    else:
        kwargs |= {"device": "auto", "dtype": groups.dtype}
    return ENGINES[groups.backend], kwargs


@dataclass(frozen=True, kw_only=True)
class Extender:
    """The deployment as the pipeline sees it: its handle, and how long an answer may take."""

    handle: Any
    max_s: float


async def prompt_to_encode(
    job: Job,
    ticket: JobTicket,
    *,
    extender: Extender | None,
    store: JobStore,
    call: Call,
    progress: Progress,
) -> str:
    """The text that the experts are given. What an extension led to is stored before it is used:
    a later attempt finds it in `job` and asks nobody. Raises LeaseLost."""
    if job.revised_prompt is not None:
        return job.revised_prompt
    prompt = compose(job.prompt, job.cinematography)
    if not job.extend_prompt or job.prompt_note is not None:
        return prompt
    await progress(STAGE, 0)
    revised, note = await _extended(job, ticket, prompt, extender, call)
    if not await store.record_prompt(job.id, job.attempt, revised_prompt=revised, note=note):
        raise LeaseLost(job.id)
    return revised or prompt


async def _extended(
    job: Job, ticket: JobTicket, prompt: str, extender: Extender | None, call: Call
) -> tuple[str | None, str | None]:
    """(the revised prompt, None), or (None, why there is none)."""
    if extender is None:
        return None, _note("this service has none any more")
    extend, arguments = extender.handle.extend, (ticket, prompt, _task(job), job.input_image)
    try:
        async with asyncio.timeout(extender.max_s):
            try:
                _, result = await call(extend, *arguments)
            except (GroupDead, RayActorError):  # another replica may live, or will soon
                await asyncio.sleep(RETRY_DELAY_S)
                _, result = await call(extend, *arguments)
        revised = result.artifacts["revised_prompt"]
        if not is_storable(revised):
            raise ValueError("the answer is no valid text")
    except Exception as error:  # whatever it was, the video does not depend on it
        logger.warning("%s: prompt extension failed: %s", job.id, error)
        return None, _note(_reason(error))
    return revised, None


def _task(job: Job) -> str:
    if job.input_image is not None:
        return "i2v"
    return "image" if job.params["num_frames"] == 1 else "t2v"


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, TimeoutError):
        return "it took too long"
    if isinstance(cause, ValueError):  # an engine's sentence
        return str(cause)[:300]
    return "an error in the service"


def _note(reason: str) -> str:
    return f"the prompt was used without extension: {reason}"
