"""CUDA C++ kernels for Hopper GPUs: compiled by NVRTC once a process, loaded once a device.

Owns all that goes through cuda-bindings, which is imported when it is first needed, so that callers
can be imported without it; what the kernels share is in the `.cuh` files. Knows nothing about what
they compute.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Function `name` of `file`, which lies beside this one. `who` is named by every error.

    `macros` are its -D options. A block has `num_threads` and `shared_bytes` of shared memory.
    """

    who: str
    file: str
    name: str
    num_threads: int
    shared_bytes: int
    macros: tuple[tuple[str, int], ...] = ()

    def launch(
        self, grid: tuple[int, int], values: tuple[Any, ...], types: tuple[type | None, ...]
    ) -> None:
        """On the current device and stream. `types` are ctypes; None for a tensor map.

        ValueError where cuda-bindings is missing, RuntimeError for what else goes wrong.
        """
        function = self.load()
        checked(
            self.who,
            _driver(self.who).cuLaunchKernel(
                function, *grid, 1, self.num_threads, 1, 1, self.shared_bytes,
                torch.cuda.current_stream().cuda_stream, (values, types), 0,
            ),
        )  # fmt: skip

    def load(self) -> Any:
        """Compiled and on the current device, as a launch needs it; both once."""
        return _function(self, torch.cuda.current_device())


@functools.lru_cache(maxsize=1024)
def tensor_map(
    who: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """How TMA copies boxes of bfloat16 values out of a tensor: 0 for what lies outside.

    Innermost dimension first; `strides` in bytes, without the innermost one. A box's innermost rows
    have 64 or 128 bytes and are swizzled by as many. A map holds no more than these numbers, so
    that the last one serves for whatever lies there now.
    """
    driver = _driver(who)
    swizzle = f"CU_TENSOR_MAP_SWIZZLE_{2 * box[0]}B"
    return checked(
        who,
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, len(sizes), address,
            [driver.cuuint64_t(n) for n in sizes], [driver.cuuint64_t(n) for n in strides],
            [driver.cuuint32_t(n) for n in box], [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )  # fmt: skip


@functools.cache
def has_bindings() -> bool:
    """Whether cuda-bindings is installed and finds its compiler, NVRTC."""
    try:
        from cuda.bindings import nvrtc

        checked("NVRTC", nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError):
        return False
    return True


@functools.cache
def is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def num_processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def checked(who: str, result: tuple) -> Any:
    """What a call of the CUDA bindings returned after its error code. RuntimeError for an error."""
    error, *values = result
    if error.value:
        raise RuntimeError(
            f"{who}: {error.name}: is cuda-bindings of torch's CUDA version, {torch.version.cuda}?"
        )
    return values[0] if values else None


@functools.cache
def _driver(who: str) -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ValueError(f"{who} needs cuda-bindings: pip install cuda-bindings") from error
    return driver


@functools.cache
def _function(kernel: Kernel, device: int) -> Any:
    """The kernel, loaded on the current device. RuntimeError where it cannot be compiled."""
    driver, who = _driver(kernel.who), kernel.who
    module = checked(who, driver.cuModuleLoadData(compiled(kernel)))
    function = checked(who, driver.cuModuleGetFunction(module, kernel.name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(who, driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes))
    return function


@functools.cache
def compiled(kernel: Kernel) -> bytes:
    """Machine code for Hopper."""
    from cuda.bindings import nvrtc

    who, here = kernel.who, Path(__file__).parent
    headers = sorted(here.glob("*.cuh"))
    program = checked(
        who,
        nvrtc.nvrtcCreateProgram(
            (here / kernel.file).read_bytes(), kernel.file.encode(), len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        ),
    )  # fmt: skip
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    options += [f"-D{name}={value}".encode() for name, value in kernel.macros]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * checked(who, nvrtc.nvrtcGetProgramLogSize(program))
        checked(who, nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{kernel.file} does not compile: {log.decode()[:400]}")
    code = b" " * checked(who, nvrtc.nvrtcGetCUBINSize(program))
    checked(who, nvrtc.nvrtcGetCUBIN(program, code))
    return code
