"""Lets a test run the Triton kernels: on a GPU as they are, on a CPU in Triton's interpreter (see
conftest.py)."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_kernels(monkeypatch: pytest.MonkeyPatch, ops: ModuleType) -> None:
    """`ops` calls its kernels for every tensor. Skips the test where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(ops, "_uses_kernels", lambda x: True)
    if DEVICE == "cpu":
        _repair_interpreter(monkeypatch)


def _repair_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the interpreter of Triton 3.6 and 3.7: an fp8 mantissa that rounds up past its end
    loses its carry."""
    import triton.language as tl
    from triton.runtime import interpreter

    to_float = interpreter._convert_float

    def with_carry(data, from_type, to_type, rounding):
        if (from_type, to_type) != (tl.float32, tl.float8e4nv):
            return to_float(data, from_type, to_type, rounding)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", with_carry)
