"""Open a backend by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backend.errors import BackendError
from backend.memory import GIB, memory_plan

if TYPE_CHECKING:
    from backend.base import Backend, EngineLimits
    from backend.geometry import ModelGeometry

KINDS = ("profile", "cuda", "cpu")


def open_backend(
    kind: str,
    *,
    geometry: ModelGeometry,
    limits: EngineLimits,
    profile: str | None = None,
    gpu_bytes: int | None = None,
    seed: int = 0,
    deterministic: bool = False,
    verify: int = 0,
) -> Backend:
    """The backend `kind`: `profile` replays one, `cuda` and `cpu` execute every step.

    KV blocks follow from the memory model on the profile's or the device's memory, or on `gpu_bytes` where given.
    `deterministic` and `verify` (every so many steps; 0: none) are of backends that execute: `LiveBackend`, `VerifyingBackend`.
    """
    if kind == "profile":
        if deterministic or verify:
            raise BackendError("backend profile: executes nothing, so there is nothing to verify or make deterministic")
        return _replay(geometry, limits, profile, gpu_bytes)
    if kind not in KINDS:
        raise BackendError(f"backend {kind}: unknown; use one of {', '.join(KINDS)}")
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError("backend cuda: torch sees no CUDA device here; use backend profile or cpu")
    from backend.live import LiveBackend
    from backend.measure import device_bytes

    blocks = memory_plan(geometry, limits, gpu_bytes or device_bytes(kind)).num_gpu_blocks
    try:
        live = LiveBackend(geometry, limits, blocks, device=kind, seed=seed, deterministic=deterministic)
    except torch.OutOfMemoryError as error:
        free, total = (b / GIB for b in torch.cuda.mem_get_info())
        raise BackendError(
            f"backend {kind}: {geometry.name} fits an empty GPU, but only {free:.1f} of {total:.1f} GiB are free; end what"
            " else runs there or lower engine.gpu_memory_utilization"
        ) from error
    if not verify:
        return live
    from backend.verify import VerifyingBackend

    return VerifyingBackend(live, verify)


def _replay(geometry: ModelGeometry, limits: EngineLimits, profile: str | None, gpu_bytes: int | None) -> Backend:
    from backend.profile import load_profile
    from backend.replay import ReplayBackend

    if profile is None:
        raise BackendError("backend profile: needs the name or folder of a profile (backend.profile)")
    loaded = load_profile(profile)
    measured = loaded.meta.get("geometry")
    if measured != geometry.name:
        raise BackendError(
            f"profile {profile}: measured for geometry {measured}, the scenario's model is {geometry.name}"
        )
    blocks = memory_plan(geometry, limits, gpu_bytes or loaded.gpu_bytes).num_gpu_blocks
    return ReplayBackend(loaded, geometry, limits, blocks)
