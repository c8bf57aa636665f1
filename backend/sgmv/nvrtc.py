"""CUDA source to launchable kernels: compiled at run time by NVRTC, launched through the driver.

Both are reached through `cuda-bindings`, which CUDA builds of torch (2.11 and later) install; no toolkit is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch

from backend.errors import BackendError

SOURCES = (
    "common.cu",
    "shrink.cu",
    "expand_parts.cu",
    "expand.cu",
    "expand_long.cu",
    "expand_swiglu.cu",
    "segment_map.cu",
    "shrink_share.cu",
    "fused_parts.cu",
    "few_deltas.cu",
    "linear.cu",
    "hopper.cu",
    "linear_wide.cu",
)


def available() -> bool:
    """Whether this machine can compile and run the CUDA kernels: a GPU of compute capability 8.0 or later."""
    return (
        torch.cuda.is_available()
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability() >= (8, 0)
        and find_spec("cuda") is not None
        and find_spec("cuda.bindings") is not None
    )


def source() -> bytes:
    """The kernels' source, one file after the other, each line still known by its file's name."""
    folder = files("backend") / "sgmv" / "cuda"
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in SOURCES).encode()


def checked(result: tuple[Any, ...], doing: str) -> Any:
    if int(result[0]) != 0:
        raise BackendError(f"{doing}: {result[0]!r}")
    return result[1] if len(result) > 1 else None


def compile_cubin(capability: tuple[int, int], *, half: bool) -> bytes:
    """Machine code for GPUs of `capability`, for float16 (`half`) or bfloat16. Raises `BackendError` with the log."""
    from cuda.bindings import nvrtc

    doing = "sgmv: NVRTC"
    program = checked(nvrtc.nvrtcCreateProgram(source(), b"sgmv.cu", 0, [], []), doing)
    # wgmma is in sm_90a alone, whose machine code runs on GPUs of 9.0 and no others.
    suffix = "a" if capability == (9, 0) else ""
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}{suffix}".encode(),
        b"--std=c++17",
        *([b"-DFP16"] * half),
    ]
    if int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), doing)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"sgmv: the CUDA kernels do not compile: {log.decode()}")
    cubin: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), doing)
    checked(nvrtc.nvrtcGetCUBIN(program, cubin), doing)
    return cubin


def pointers_to(values: Sequence[Any]) -> ctypes.Array[ctypes.c_void_p]:
    """The driver's argument list for ctypes `values`, which must outlive the launch call."""
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one dtype on the current device by name; `processors`: its multiprocessors.

    `rooms`: bytes of shared memory that a block of each may ask for.
    """

    functions: Mapping[str, Any]
    rooms: Mapping[str, int]
    processors: int

    def launch(
        self,
        name: str,
        grid: int,
        threads: int,
        values: Sequence[Any],
        shared_bytes: int = 0,
        *,
        early: bool,
        cluster: int = 1,
    ) -> None:
        """Launch on torch's current stream with ctypes `values` as arguments.

        `early`: the kernel may begin while its predecessor in the stream still runs (programmatic dependent launch;
        ignored before sm_90). `cluster`: blocks that run together and see each other's shared memory (sm_90).
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        attributes = []
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        arguments = pointers_to(values)
        checked(driver.cuLaunchKernelEx(config, self.functions[name], ctypes.addressof(arguments), 0), f"sgmv: {name}")


@cache
def kernels(dtype: torch.dtype) -> Kernels:
    """Compile and load the kernels for `dtype` (bfloat16 or float16) on the current device."""
    from cuda.bindings import driver

    if dtype not in (torch.bfloat16, torch.float16):
        raise BackendError(f"sgmv: the CUDA kernels take bfloat16 or float16, not {dtype}")
    cubin = compile_cubin(torch.cuda.get_device_capability(), half=dtype == torch.float16)
    torch.cuda.current_stream().synchronize()  # makes torch's context current
    module = checked(driver.cuModuleLoadData(cubin), "sgmv: load")
    count = checked(driver.cuModuleGetFunctionCount(module), "sgmv: load")
    device = checked(driver.cuCtxGetDevice(), "sgmv: load")
    optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    most = checked(driver.cuDeviceGetAttribute(optin, device), "sgmv: load")
    functions, rooms = {}, {}
    for function in checked(driver.cuModuleEnumerateFunctions(count, module), "sgmv: load"):
        name = checked(driver.cuFuncGetName(function), "sgmv: load").decode()
        attributes = driver.CUfunction_attribute
        fixed = checked(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), name)
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, dynamic, most - fixed), name)
        functions[name], rooms[name] = function, most - fixed
    return Kernels(functions, rooms, torch.cuda.get_device_properties().multi_processor_count)
