"""SGMV on a GPU: against float64, poisoned scratch, and I9 bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.sgmv import Segments, SlotBank, SlotLayout

pytestmark = pytest.mark.gpu

LINEARS = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
RANKS = [8, 16, 32, 64, 16, 8]


@pytest.fixture(scope="module")
def bank() -> SlotBank:
    bank = SlotBank(SlotLayout.of(LINEARS, 1), len(RANKS), 64, dtype=torch.bfloat16, device=torch.device("cuda"))
    bank.weights.fill_(float("nan"))
    for slot, rank in enumerate(RANKS):
        packed = torch.randn(rank * bank.layout.unit, device="cuda", dtype=torch.bfloat16) * 0.02
        bank.write(slot, packed, rank, 0.5 + slot)
    return bank


def run(x: torch.Tensor, base: torch.Tensor, bank: SlotBank, name: str, slots: np.ndarray) -> torch.Tensor:
    from backend.sgmv.kernels import scratch_elements, sgmv

    segments = Segments.of(slots)
    out = base.clone()
    rows = torch.zeros(len(slots), dtype=torch.int32)
    rows[: len(segments.rows)] = torch.from_numpy(segments.rows)
    poison = torch.full((scratch_elements(len(slots), 64, 14336),), float("nan"), device="cuda")
    tiles = torch.from_numpy(np.concatenate([segments.tiles, np.full((3, 3), -1, dtype=np.int32)])).cuda()
    sgmv(x, out, bank, bank.layout.layers[0][name], rows.cuda(), tiles, poison)
    return out


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("rows", [1, 7, 33, 256, 1000])
def test_grouped_equals_float64_and_each_row_alone(bank: SlotBank, name: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    linear = bank.layout.layers[0][name]
    slots = rng.integers(-1, len(RANKS) - 1, rows).astype(np.int32)
    if rows == 1:
        slots[0] = 3
    x = torch.randn(rows, linear.in_features, device="cuda", dtype=torch.bfloat16)
    base = torch.zeros(rows, sum(linear.out_features), device="cuda", dtype=torch.bfloat16)
    out = run(x, base, bank, name, slots)
    expected = torch.zeros(rows, sum(linear.out_features), dtype=torch.float64, device="cuda")
    for slot in range(len(RANKS)):
        mine = torch.from_numpy(slots == slot).cuda()
        parts = [
            x[mine].double() @ bank.a(slot, linear, i).double().T @ bank.b(slot, linear, i).double()
            for i in range(linear.slices)
        ]
        expected[mine] = torch.cat(parts, 1) * float(bank.scaling[slot])
    error = float((out.double() - expected).norm() / expected.norm())
    print(f"{name} rows={rows} relative error {error:.2e}")
    assert error < 1e-2
    for t in rng.choice(rows, min(rows, 40), replace=False).tolist():
        alone = run(x[t : t + 1], base[t : t + 1], bank, name, slots[t : t + 1])
        assert torch.equal(alone[0], out[t]), f"I9: row {t} of slot {slots[t]} differs from itself alone"
