"""Programmatic dependent launch of Triton kernels, on GPUs that have it (sm_90 and later).

A kernel may be started while its predecessor in the stream still runs, and lets its own successor start at once: a base
product that follows has its weights on their way by then. As in `sgmv/cuda/common.cu`, nothing that the step computes is
read or written before the predecessor has completed. Weights may be, and the step's inputs: torch's kernels that take the
tokens' embeddings start after these are there, and the first of ours after those.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlap() -> dict[str, bool]:
    """Options to launch a kernel with that begins with `enter(PDL)`, or with `let_next_start` and later `wait_for_previous`."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def enter(PDL: tl.constexpr):
    let_next_start(PDL)
    wait_for_previous(PDL)
