"""What the SGMV benchmark times: cold adapter weights, Punica's adapter mixes, graph replays, and a byte floor.

Shapes, mixes, rotation and floor are those of the peer measurements that `--peers` compares with: one call is the whole
LoRA part of one fused linear; calls rotate over enough weight sets that 160 MB is touched before one comes again; x and
y are the same buffers in all calls, as they are hot after a base product.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from backend.sgmv import FusedLinear, Segments, SlotBank, SlotLayout, sgmv

LINEARS: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""The fused linears of one Llama-3.1-8B layer: width in, widths out."""

DISTRIBUTIONS = ("distinct", "identical", "uniform", "skewed")
"""How rows are spread over adapters (`Cell.slots`); besides `seg4`, four adapters' rows one after the other, and its like."""

COLD_BYTES = 160e6
MOST_CALLS = 512
BYTES_PER_S, FLOPS_PER_S = 2.443e12, 788e12
"""Copy bandwidth and dense bf16 rate that the peers' floor was computed with; kept, so that floors compare."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: a linear, rows, how they are spread over adapters, and the rank of all of them."""

    layer: str
    rows: int
    distribution: str
    adapters: int
    rank: int

    def slots(self) -> list[int]:
        """The slot of each row."""
        rows, adapters = self.rows, self.adapters
        if self.distribution == "distinct":
            return list(range(rows))
        if self.distribution == "identical":
            return [0] * rows
        if self.distribution == "uniform":
            return [i % adapters for i in range(rows)]
        if self.distribution == "skewed":
            weights = [1.5**-i for i in range(adapters)]
            counts = [max(1, round(rows * w / sum(weights))) for w in weights]
            counts[0] += rows - sum(counts)
            mixed = [slot for slot, count in enumerate(counts) for _ in range(count)]
            random.Random(1).shuffle(mixed)  # noqa: S311 - a benchmark's order
            return mixed
        return [min(i * adapters // rows, adapters - 1) for i in range(rows)]

    def weights(self) -> int:
        """Elements of all A and B in use."""
        width, outs = LINEARS[self.layer]
        return self.adapters * self.rank * (len(outs) * width + sum(outs))

    def read_us(self) -> float:
        """Microseconds for reading each used A and B once."""
        return 2 * self.weights() / BYTES_PER_S * 1e6

    def floor_us(self) -> float:
        """Microseconds for the bytes or the arithmetic, whichever takes longer: each used A and B once, x, y twice."""
        width, outs = LINEARS[self.layer]
        nbytes = 2 * (self.weights() + self.rows * (width + 2 * sum(outs)))
        flops = 2 * self.rows * self.rank * (len(outs) * width + sum(outs))
        return max(nbytes / BYTES_PER_S, flops / FLOPS_PER_S) * 1e6


def grid(ranks: tuple[int, ...] = (8, 16, 64)) -> list[Cell]:
    """Every cell of the peers' table."""
    mixes: list[tuple[int, str, int]] = [(1, "identical", 1)]
    for rows in (8, 32, 64, 128, 256):
        root = math.ceil(math.sqrt(rows))
        mixes += [(rows, "distinct", rows), (rows, "identical", 1), (rows, "skewed", root), (rows, "uniform", root)]
    mixes += [(rows, f"seg{n}", n) for rows in (512, 2048, 8192) for n in (1, 4, 16)]
    return [Cell(layer, *mix, rank) for mix in mixes for rank in ranks for layer in LINEARS]


def default_slots(adapters: int) -> int:
    """Adapter slots that the peers were given: a power of two, at least 8."""
    return max(8, 1 << (adapters - 1).bit_length())


def _layout(layer: str, sets: int) -> SlotLayout:
    """`sets` copies of one fused linear, as if each were a layer of its own."""
    width, outs = LINEARS[layer]
    offset, layers = 0, []
    for _ in range(sets):
        a_units = tuple(offset + i * width for i in range(len(outs)))
        offset += width * len(outs)
        b_units = tuple(offset + sum(outs[:i]) for i in range(len(outs)))
        offset += sum(outs)
        layers.append({layer: FusedLinear(width, outs, a_units, b_units)})
    return SlotLayout(tuple(layers), offset)


def make_bank(layer: str, ranks: list[int], max_rank: int, sets: int) -> SlotBank:
    """A bank of random adapters, one a slot, `sets` times over."""
    bank = SlotBank(_layout(layer, sets), len(ranks), max_rank, dtype=torch.bfloat16, device=torch.device("cuda"))
    for slot, rank in enumerate(ranks):
        bank.ranks[slot] = rank
        for item in bank.layout.layers:
            linear = item[layer]
            # A and B of such size that the delta is about as large beside y as in the peers' data.
            start, middle = rank * linear.a_units[0], rank * linear.b_units[0]
            bank.weights[slot, start:middle].normal_(0, 0.02)
            bank.weights[slot, middle : middle + rank * sum(linear.out_features)].normal_(0, 0.067)
    return bank


class Workbench:
    """One cell ready to be timed: weights, rows, and one `Segments` for each group of slots that calls rotate over."""

    def __init__(
        self, cell: Cell, *, slots: int | None = None, ranks: list[int] | None = None, sets: int | None = None
    ) -> None:
        """`sets`: copies of the linear that calls rotate over, in the first slots; None: as many as keep weights cold."""
        width, outs = LINEARS[cell.layer]
        slots = slots or default_slots(cell.adapters)
        ranks = ranks or [cell.rank] * slots
        used = sum(ranks[: cell.adapters]) * (len(outs) * width + sum(outs)) * 2
        shifts = max(1, slots // cell.adapters) if sets is None and len(set(ranks)) == 1 else 1
        sets = sets or max(1, min(math.ceil(COLD_BYTES / (used * shifts)), MOST_CALLS // shifts))
        self.cell = cell
        self.bank = make_bank(cell.layer, ranks, max(ranks), sets)
        self.linears = [item[cell.layer] for item in self.bank.layout.layers]
        self.x = torch.randn(cell.rows, width, dtype=torch.bfloat16, device="cuda")
        self.y = torch.randn(cell.rows, sum(outs), dtype=torch.bfloat16, device="cuda")
        base = torch.tensor(cell.slots(), dtype=torch.int32, device="cuda")
        self.row_slots = [base + shift * cell.adapters for shift in range(shifts)]
        self.segments = [Segments.allocate(cell.rows, self.bank).of(rows, self.bank) for rows in self.row_slots]
        self.calls = list(itertools.product(self.linears, self.segments))

    def run_all(self) -> None:
        """Every call once."""
        for linear, segments in self.calls:
            sgmv(self.x, self.y, self.bank, linear, segments)

    def exact(self) -> torch.Tensor:
        """Output of the first call in float64: y plus the delta."""
        linear, slots = self.linears[0], self.row_slots[0]
        truth = self.y.double()
        for slot in sorted(set(slots.tolist())):
            mine, begin = slots == slot, 0
            for i, columns in enumerate(linear.out_features):
                a, b = self.bank.a(slot, linear, i).double(), self.bank.b(slot, linear, i).double()
                truth[mine, begin : begin + columns] += self.x[mine].double() @ a.T @ b
                begin += columns
        return truth

    def errors(self) -> tuple[float, float]:
        """Relative error of the delta against float64, |out - exact| / |exact - y|: ours, and of the exact result rounded.

        No result of y's type has a smaller one than the second.
        """
        truth, out = self.exact(), self.y.clone()
        sgmv(self.x, out, self.bank, self.linears[0], self.segments[0])
        delta = (truth - self.y.double()).norm()
        rounded = truth.to(self.y.dtype).double()
        return float((out.double() - truth).norm() / delta), float((rounded - truth).norm() / delta)


def time_graph(run: Callable[[], None], calls: int, replays: int = 25) -> tuple[float, float]:
    """Median and least microseconds a call of `run`, which makes `calls` of them, replayed as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):  # after a pause the first ones take longer
        graph.replay()
    taken = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / calls)
    taken.sort()
    return taken[len(taken) // 2], taken[0]
