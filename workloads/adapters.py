"""Adapters: the catalogue of LoRA fine-tunes that requests may name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workloads.errors import WorkloadError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a decoder layer that LoRA adapts, by their PEFT names."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter: `W' = W + scaling * B @ A` on each of its target modules; `folder`: where its weights lie, if anywhere."""

    adapter_id: int
    name: str
    rank: int
    target_modules: tuple[str, ...] = TARGET_MODULES
    folder: str | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.adapter_id < 1:
            raise WorkloadError(
                f"adapter {self.name}: adapter_id is {self.adapter_id}, must be >= 1 (0 is the base model)"
            )
        if not (8 <= self.rank <= 256 and self.rank % 8 == 0):
            raise WorkloadError(f"adapter {self.name}: rank is {self.rank}, must be a multiple of 8 from 8 to 256")
        unknown = [m for m in self.target_modules if m not in TARGET_MODULES]
        if unknown or not self.target_modules:
            raise WorkloadError(
                f"adapter {self.name}: target_modules {unknown} unknown; use some of {', '.join(TARGET_MODULES)}"
            )


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All adapters of a run; adapter ids are 1 … n in order."""

    adapters: tuple[Adapter, ...]

    def __post_init__(self) -> None:
        if any(a.adapter_id != i for i, a in enumerate(self.adapters, start=1)):
            raise WorkloadError("adapter ids must be 1 … n in order")

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, adapter_id: int) -> Adapter:
        return self.adapters[adapter_id - 1]

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.adapters)

    @classmethod
    def uniform(cls, count: int, ranks: Sequence[int], target_modules: tuple[str, ...] = TARGET_MODULES) -> Catalogue:
        """`count` adapters whose ranks repeat `ranks` in rotation."""
        return cls(
            tuple(Adapter(i, f"adapter-{i}", ranks[(i - 1) % len(ranks)], target_modules) for i in range(1, count + 1))
        )
