"""GroupSpec: what a group runs and what it needs, as one value that is checked once.

It also says how Serve must place the replica that leads the group, so that the numbers exist in
one place. Knows no Ray API, no engine and no model: the engine is an import string.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STRATEGIES = ("STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD")
BACKENDS = ("auto", "gloo", "nccl")


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """One group: `num_workers` ranks of `engine`, each in its own process.

    engine                import string "package.module:Class"
    engine_kwargs         given to Class in every rank; device "auto" becomes "cuda:0" in a worker
                          that has a GPU, "cpu" in one that has none
    num_gpus_per_worker   0, 1, or a share of one GPU (for one-worker groups only)
    strategy              how the workers spread over nodes, in Ray's words
    worker_env            environment of the workers and of nobody else (NCCL_* belongs here)
    start_timeout_s       from the first worker asked for until every engine is constructed
    step_timeout_s        deadline of a call that names none
    divergence_grace_s    once a rank has raised, how long the others may take to raise too
    collective_backend    "auto": nccl where workers have GPUs, gloo elsewhere
    """

    engine: str
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold a key
    num_workers: int = 1
    num_gpus_per_worker: float = 0.0
    num_cpus_per_worker: float = 1.0
    strategy: str = "STRICT_PACK"
    worker_env: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 600.0
    step_timeout_s: float = 120.0
    divergence_grace_s: float = 5.0
    collective_backend: str = "auto"

    def __post_init__(self) -> None:
        module, _, name = self.engine.partition(":")
        if not (module and name):
            raise ValueError(f"engine must be 'package.module:Class', got {self.engine!r}")
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        gpus = self.num_gpus_per_worker
        if not 0 <= gpus <= 1:
            raise ValueError(
                f"num_gpus_per_worker must be 0 to 1 (a rank drives one GPU), got {gpus}"
            )
        if 0 < gpus < 1 and self.num_workers > 1:
            raise ValueError(
                f"num_gpus_per_worker {gpus} with num_workers {self.num_workers}: ranks that share "
                "a GPU cannot form an NCCL group; use 1 GPU per worker or 1 worker"
            )
        if self.num_cpus_per_worker < 0 or self.num_cpus_per_worker + gpus <= 0:
            raise ValueError(
                f"num_cpus_per_worker {self.num_cpus_per_worker} + num_gpus_per_worker {gpus}: "
                "a worker must ask for something"
            )
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}")
        if self.collective_backend not in BACKENDS:
            raise ValueError(
                f"collective_backend must be one of {BACKENDS}, got {self.collective_backend!r}"
            )
        for name in ("start_timeout_s", "step_timeout_s", "divergence_grace_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def device(self) -> str:
        """What "auto" means inside a worker of this group."""
        return "cuda:0" if self.num_gpus_per_worker > 0 else "cpu"

    @property
    def backend(self) -> str:
        """The collective backend of a group of more than one worker."""
        if self.collective_backend != "auto":
            return self.collective_backend
        return "nccl" if self.num_gpus_per_worker > 0 else "gloo"

    @property
    def collective_timeout_s(self) -> float:
        """How long a collective may wait for a slow rank: the last fence behind the deadlines."""
        return max(self.start_timeout_s, self.step_timeout_s)

    def bundles(self) -> list[dict[str, float]]:
        """One bundle per worker; the leading replica asks for nothing and sits in bundle 0."""
        bundle = {"CPU": self.num_cpus_per_worker, "GPU": self.num_gpus_per_worker}
        return [{k: float(v) for k, v in bundle.items() if v} for _ in range(self.num_workers)]

    def deployment_options(self) -> dict[str, Any]:
        """Options for `serve.deployment` of a replica that calls `RayGroup.start(self)`."""
        return {
            "placement_group_bundles": self.bundles(),
            "placement_group_strategy": self.strategy,
            "ray_actor_options": {"num_cpus": 0, "num_gpus": 0},
        }

    def resolved_engine_kwargs(self) -> dict[str, Any]:
        """`engine_kwargs` with device "auto" replaced."""
        kwargs = dict(self.engine_kwargs)
        if kwargs.get("device") == "auto":
            kwargs["device"] = self.device
        return kwargs
