"""What is asked of the service, and when: request bodies with weights, and arrival times.

Owns the workload file and every draw from a seed, so that two runs ask for the same videos. Pure
but for reading that file: knows nothing about HTTP or clocks.

    # workload.yaml: a body is that of POST /v1/videos
    - weight: 3
      body: {prompt: "a red circle moves, take {index}", size: 128x128, num_frames: 17}
    - weight: 1
      body: {model: i2v, prompt: "a boat, take {index}", input_reference: boat.png}

`{index}` in a prompt becomes the job's number: a prompt that repeats is encoded only once. Without
`seed`, the job's position in the run is the seed. An image is a file beside the workload or a URL.
"""

from __future__ import annotations

import base64
import mimetypes
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Body = dict[str, Any]

IMAGE_FIELDS = ("input_reference", "last_image")


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """One kind of request; `weight` is its share relative to the others'."""

    body: Body
    weight: float = 1.0

    def __post_init__(self) -> None:
        if "prompt" not in self.body:
            raise ValueError(f"a body needs a prompt, got {self.body}")
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")


SMALL_JOB = Weighted(
    body={
        "prompt": "a red circle moves to the right, take {index}",
        "size": "128x128",
        "num_frames": 17,
    }
)
"""The default: a small video of the first model, with that model's number of steps."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    entries: tuple[Weighted, ...] = (SMALL_JOB,)

    @classmethod
    def read(cls, path: Path) -> Workload:
        """Raises ValueError naming the file when it is no list of {body, weight}."""
        entries = yaml.safe_load(path.read_text())
        try:
            found = [Weighted(**entry) for entry in entries]
            bodies = [_with_images(entry.body, path.parent) for entry in found]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no list of {{body, weight}}: {error}") from error
        if not found:
            raise ValueError(f"{path} lists no request")
        return cls(
            entries=tuple(
                Weighted(body=body, weight=entry.weight)
                for body, entry in zip(bodies, found, strict=True)
            )
        )

    def bodies(self, num_jobs: int, *, seed: int, first_index: int = 0) -> list[Body]:
        """The same kinds in the same order for the same `seed`, whatever `first_index` is."""
        weights = [entry.weight for entry in self.entries]
        kinds = random.Random(f"mix {seed}").choices(self.entries, weights, k=num_jobs)
        return [
            _numbered(kind.body, position=position, index=first_index + position)
            for position, kind in enumerate(kinds)
        ]

    def one_of_each(self, *, first_index: int) -> list[Body]:
        return [
            _numbered(entry.body, position=position, index=first_index + position)
            for position, entry in enumerate(self.entries)
        ]


def poisson_arrivals(*, jobs_per_minute: float, duration_s: float, seed: int) -> list[float]:
    """Seconds from the start, rising, all below `duration_s`: gaps are exponential."""
    if not jobs_per_minute > 0:
        raise ValueError(f"the rate must be above 0 jobs per minute, got {jobs_per_minute}")
    draw = random.Random(f"arrivals {seed}")
    arrivals, at_s = [], draw.expovariate(jobs_per_minute / 60)
    while at_s < duration_s:
        arrivals.append(at_s)
        at_s += draw.expovariate(jobs_per_minute / 60)
    return arrivals


def _numbered(body: Body, *, position: int, index: int) -> Body:
    prompt = body["prompt"].replace("{index}", str(index))
    return {"seed": position} | body | {"prompt": prompt}


def _with_images(body: Body, folder: Path) -> Body:
    """Images named as files become data URIs."""
    images = {}
    for field in IMAGE_FIELDS:
        name = body.get(field)
        if isinstance(name, str) and "://" not in name and not name.startswith("data:"):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            images[field] = {"image_url": f"data:{media_type};base64,{data}"}
    return body | images
