"""Lets a test run the Triton kernels: on a GPU as they are, on a CPU in Triton's interpreter (see
conftest.py)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_kernels(monkeypatch: pytest.MonkeyPatch, ops: ModuleType) -> None:
    """`ops` calls its kernels for every tensor. Skips the test where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(ops, "_uses_kernels", lambda x: True)
