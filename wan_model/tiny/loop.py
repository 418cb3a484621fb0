"""The training loop: float32 weights, their steps, the running average, one CUDA graph for it all.

Owns everything that is the same for every network: mixed precision, clipping, the learning rate
over the time that is lent, logging and the training checkpoint. Knows nothing about what is
trained; a loss is a function of a random generator that reads tensors of fixed shapes.

These networks are so small that launching their kernels takes longer than running them. Hence the
graph, and hence one flat vector for all weights: the optimizer is then a handful of kernels.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_model.tiny.muon import MatrixView, Muon

Loss = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""-> the number to minimise, and the parts of it to be logged, [K]."""

_WARM_UP_LAUNCHES = 3  # before a capture, so that libraries have made their plans and workspaces
_SYNCHRONISE_EVERY = 8  # iterations; else the host would run minutes ahead of the device
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train and how fast. The rate warms up, then falls by a half cosine to 1 %.

    Either `num_iterations` or `seconds` is the length; `num_warm_up` is in iterations.
    """

    learning_rate: float
    num_iterations: int | None = None
    seconds: float | None = None
    num_warm_up: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    largest_gradient: float = 1.0
    average_decay: float = 0.999

    def __post_init__(self) -> None:
        if (self.num_iterations is None) == (self.seconds is None):
            raise ValueError("give either num_iterations or seconds")


class Loop:
    """Trains `networks`, in whatever dtypes their parameters have, with float32 master weights."""

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        schedule: Schedule,
        *,
        part_names: tuple[str, ...],
        device: torch.device,
        seed: int = 0,
        log_every_s: float = 5.0,
        num_stacked: Callable[[str, Tensor], int] | None = None,
    ) -> None:
        """`num_stacked(name, parameter)`: how many matrices, one below the other, `Muon` is to see
        in a parameter; 0 leaves it to AdamW, as all are without this function.
        """
        self.schedule = schedule
        self.part_names = part_names
        self.device = device
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self._log_every_s = log_every_s
        self._parameters = {
            f"{key}.{name}": parameter
            for key, network in networks.items()
            for name, parameter in network.named_parameters()
        }
        flat = torch.cat([p.detach().float().flatten() for p in self._parameters.values()])
        self.weights = nn.Parameter(flat)
        self.weights.grad = torch.zeros_like(flat)
        self.average = flat.clone()
        self._views = self._cut(self.weights.detach())
        self._gradient_views = self._cut(self.weights.grad)
        self._rate = torch.zeros((), device=device)
        self._num_steps = torch.zeros((), device=device)
        self._recent = torch.zeros(len(part_names), device=device)
        self._num_recent = 0
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            [self.weights],
            lr=self._rate,
            betas=schedule.betas,
            weight_decay=0.0,
            fused=True,
            capturable=on_gpu,
        )
        self._muon = Muon(self._matrices(num_stacked) if num_stacked else [])
        self._generator = torch.Generator(device).manual_seed(seed)
        self._started_s = self._logged_s = time.monotonic()

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """`flat` as views in the shapes of the parameters."""
        parameters = list(self._parameters.values())
        pieces = flat.split([p.numel() for p in parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def _matrices(self, num_stacked: Callable[[str, Tensor], int]) -> list[MatrixView]:
        views = zip(self._parameters, self._views, self._gradient_views, strict=True)
        return [
            pair
            for name, weight, gradient in views
            if (count := num_stacked(name, weight))
            for pair in zip(weight.chunk(count), gradient.chunk(count), strict=True)
        ]

    def averaged(self) -> dict[str, Tensor]:
        """The running average of every weight, "network.parameter" -> float32 on the CPU."""
        pieces = self._cut(self.average)
        return {name: t.cpu().clone() for name, t in zip(self._parameters, pieces, strict=True)}

    # ------------------------------------------------------------------------------- running

    def progress(self) -> float:
        """0 at the start, 1 when the time (or the iterations) are used up."""
        if self.schedule.num_iterations is not None:
            return self.iteration / self.schedule.num_iterations
        return (time.monotonic() - self._started_s) / self.schedule.seconds

    def run(self, loss: Loss, *, until: float = 1.0, checkpoint: Path | None = None) -> None:
        """Iterates until `progress() >= until`, saving to `checkpoint` every minute and at the end.

        Raises FloatingPointError when the loss is lost.
        """
        if self.progress() >= until:
            return
        step = self._prepare(loss)
        saved_s = time.monotonic()
        while self.progress() < until:
            self._rate.fill_(self._learning_rate())
            step()
            self._count()
            if self.iteration % _SYNCHRONISE_EVERY == 0:
                self._synchronise()
                if time.monotonic() - self._logged_s > self._log_every_s:
                    self._log()
                if checkpoint and time.monotonic() - saved_s > _SAVE_EVERY_S:
                    self.save(checkpoint)
                    saved_s = time.monotonic()
        self._log()
        if checkpoint:
            self.save(checkpoint)

    def measure_s(self, loss: Loss, *, num_iterations: int = 8) -> float:
        """Seconds of one iteration, once prepared. The weights move on."""
        step = self._prepare(loss)
        self._synchronise()
        started_s = time.perf_counter()
        for _ in range(num_iterations):
            step()
        self._synchronise()
        return (time.perf_counter() - started_s) / num_iterations

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _count(self) -> None:
        self.iteration += 1
        self._num_recent += 1

    def _learning_rate(self) -> float:
        warm_up = min(1.0, (self.iteration + 1) / self.schedule.num_warm_up)
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(self.progress(), 1.0)))
        return self.schedule.learning_rate * warm_up * fall

    def _prepare(self, loss: Loss) -> Callable[[], None]:
        """One iteration as a function: on a GPU a replayed graph, else (or if that fails) eager."""

        def eager() -> None:
            self._step(loss)

        if self.device.type != "cuda":
            return eager
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_LAUNCHES):
                self._rate.fill_(self._learning_rate())
                eager()
                self._count()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            with torch.cuda.graph(graph):
                eager()
        except RuntimeError as error:
            # A failed capture leaves its generator unusable; lent minutes are worth a slower loop.
            warnings.warn(f"training without a CUDA graph: {error}", stacklevel=2)
            torch.cuda.synchronize()
            self._generator = torch.Generator(self.device).manual_seed(self.iteration)
            return eager
        return graph.replay

    def _step(self, loss: Loss) -> None:
        """Forward, backward, clip, update, average: fixed shapes, and nothing waits for the GPU."""
        for parameter in self._parameters.values():
            parameter.grad = None
        total, parts = loss(self._generator)
        total.backward()
        with torch.no_grad():
            used = [
                (view, p.grad)
                for view, p in zip(self._gradient_views, self._parameters.values(), strict=True)
                if p.grad is not None
            ]
            torch._foreach_copy_([view for view, _ in used], [gradient for _, gradient in used])
            gradient = self.weights.grad
            norm = gradient.norm()
            scale = (self.schedule.largest_gradient / (norm + 1e-6)).clamp(max=1.0)
            # A step whose gradient overflowed is a step not taken.
            gradient.copy_(torch.where(torch.isfinite(norm), gradient * scale, 0.0))
            self._muon.step(self._rate)
            self._optimizer.step()
            torch._foreach_copy_(list(self._parameters.values()), self._views)
            self._num_steps += 1
            decay = (1 + self._num_steps) / (10 + self._num_steps)
            decay = decay.clamp(max=self.schedule.average_decay)
            self.average.lerp_(self.weights, 1 - decay)
            self._recent += parts.detach()

    def _log(self) -> None:
        if not self._num_recent:
            return
        parts = (self._recent / self._num_recent).tolist()
        now = time.monotonic()
        entry = dict(zip(self.part_names, parts, strict=True)) | {
            "iteration": self.iteration,
            "seconds": round(now - self._started_s, 1),
            "learning_rate": float(self._rate),
        }
        self.history.append(entry)
        figures = " ".join(
            f"{name} {part:.4f}" for name, part in zip(self.part_names, parts, strict=True)
        )
        per_iteration_ms = 1e3 * (now - self._logged_s) / self._num_recent
        left = ""
        if self.schedule.seconds is not None:
            left = f", {self.schedule.seconds - (now - self._started_s):.0f} s left"
        print(f"{self.iteration:7d}  {figures}  {per_iteration_ms:.1f} ms/it{left}", flush=True)
        self._recent.zero_()
        self._num_recent, self._logged_s = 0, now
        if not all(math.isfinite(part) for part in parts):
            raise FloatingPointError(f"the loss is not finite at iteration {self.iteration}")

    # ---------------------------------------------------------------------- training checkpoint

    def save(self, path: Path) -> None:
        """Everything that is needed to continue exactly; atomic."""
        state = {
            "names": list(self._parameters),
            "iteration": self.iteration,
            "num_steps": self._num_steps,
            "weights": self.weights.detach(),
            "average": self.average,
            "optimizer": self._optimizer.state_dict()["state"],
            "momenta": self._muon.momenta,
            "generator": self._generator.get_state(),
            "history": self.history,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Raises ValueError when the checkpoint is of other networks."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["names"] != list(self._parameters):
            raise ValueError(f"{path} is a training checkpoint of other networks")
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self._optimizer.param_groups[0]["lr"] = self._rate
        with torch.no_grad():
            for momentum, saved in zip(self._muon.momenta, state["momenta"], strict=True):
                momentum.copy_(saved)
            self.weights.copy_(state["weights"])
            self.average.copy_(state["average"])
            self._num_steps.copy_(state["num_steps"])
            torch._foreach_copy_(list(self._parameters.values()), self._views)
        self._generator.set_state(state["generator"])
        self.iteration, self.history = state["iteration"], state["history"]

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Weights as `averaged` gives them, without the optimizer's memory of them."""
        flat = torch.cat([weights[name].flatten() for name in self._parameters])
        with torch.no_grad():
            self.weights.copy_(flat)
            self.average.copy_(flat)
            torch._foreach_copy_(list(self._parameters.values()), self._views)
