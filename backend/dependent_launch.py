"""Programmatic dependent launch of Triton kernels, on GPUs that have it (sm_90 and later).

A kernel may be started while its predecessor in the stream still runs, and lets its own successor start at once: a base
product that follows has its weights on their way by then. As in `sgmv/cuda/common.cu`, nothing is read or written before
the predecessor has completed.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlap() -> dict[str, bool]:
    """Options to launch a kernel with that begins with `enter(PDL)`."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


@triton.jit
def enter(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
