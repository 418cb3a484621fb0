"""Engines that do nothing useful, each in one way that a group must cope with."""

import os
import threading
import time


class Refused(ValueError):
    """An engine's own error, with an attribute and a constructor of its own."""

    def __init__(self, field, reason):
        super().__init__(field, reason)
        self.field = field


class Unpicklable(ValueError):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


class Toy:
    """Remembers every call in order."""

    def __init__(self, *, device="cpu", num_workers=1, fail_at_start=None):
        self.device = device
        self.num_workers = num_workers
        self.calls = []
        self.thread = threading.get_ident()
        if fail_at_start is not None and fail_at_start in (self.rank, "all"):
            raise Refused("degrees", f"rank {self.rank} refuses")

    @property
    def rank(self):
        if self.num_workers == 1:
            return 0
        import torch.distributed as dist

        return dist.get_rank()

    def note(self, value, *, sleep_s=0.0):
        time.sleep(sleep_s)
        self.calls.append(value)
        return value

    def log(self):
        return list(self.calls)

    def logs(self):
        """What every rank noted, in rank order."""
        import torch.distributed as dist

        logs = [None] * self.num_workers
        dist.all_gather_object(logs, self.calls)
        return logs

    def same_thread(self):
        return self.thread == threading.get_ident()

    def add_up(self, array):
        import torch
        import torch.distributed as dist

        total = torch.tensor(array) * (self.rank + 1)
        dist.all_reduce(total)
        return total.numpy()

    def scale(self, arrays, *, by):
        return {name: array * by for name, array in arrays.items()}

    def writeable(self, array):
        return array.flags.writeable

    def return_lock(self):
        return threading.Lock()

    def refuse(self, kind="refused", only_rank=None):
        if only_rank is not None and self.rank != only_rank:
            return None
        if kind == "refused":
            raise Refused("num_frames", "must be 4n + 1")
        if kind == "unpicklable":
            raise Unpicklable("holds a lock")
        raise RuntimeError(kind)

    def stuck_collective(self, *, absent_rank):
        """One rank raises instead of taking part; the others wait for it."""
        if self.rank == absent_rank:
            raise Refused("latents", "only I saw it")
        self.add_up([1.0])

    def late_collective(self, *, late_rank, sleep_s):
        """All ranks but one wait in a collective for `sleep_s`."""
        if self.rank == late_rank:
            time.sleep(sleep_s)
        return self.add_up([1.0])

    def where(self):
        return {
            "pid": os.getpid(),
            "device": self.device,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "nccl": os.environ.get("NCCL_DEBUG"),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }

    def wheres(self):
        import torch.distributed as dist

        wheres = [None] * self.num_workers
        dist.all_gather_object(wheres, self.where())
        return wheres


class ImportsNothing:
    """Cannot be constructed: the module it wants does not exist."""

    def __init__(self):
        import module_that_is_not_there  # noqa: F401
