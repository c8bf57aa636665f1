"""How long segments are shared out: stages of shared memory that fit, whole pieces where they are no detour."""

from __future__ import annotations

import pytest
import torch

from backend.errors import BackendError
from backend.sgmv import Segments, SlotBank, SlotLayout, cuda_kernels
from backend.sgmv.arguments import columns
from backend.sgmv.cuda_kernels import ROW_BYTES, RUNS, WHOLE_PIECES, _long_run, _stages
from backend.sgmv.nvrtc import Kernels

H100_BYTES, SMALL_BYTES = 227 * 1024, 99 * 1024
H100 = Kernels({}, {"expand_long": H100_BYTES, "expand_long_swiglu": H100_BYTES}, 132)


@pytest.mark.parametrize("room", [H100_BYTES, 163 * 1024, SMALL_BYTES])
@pytest.mark.parametrize("rows", [80, 96, 128])
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_stages_of_all_blocks_fit_a_multiprocessor(room: int, rows: int, resident: int) -> None:
    blocks, stages, shared = _stages("expand_long", rows, 4096, resident, Kernels({}, {"expand_long": room}, 132))
    assert 1 <= blocks <= resident and 2 <= stages <= cuda_kernels.MOST_STAGES
    assert shared == stages * rows * ROW_BYTES + 4096
    assert blocks * (shared + 1024) <= room + 1024


def test_too_little_shared_memory_is_said() -> None:
    with pytest.raises(BackendError, match="expand_long of such a max_lora_rank needs more shared memory"):
        _stages("expand_long", 64 + 128, 2 * 32768, 2, Kernels({}, {"expand_long": SMALL_BYTES}, 84))


@pytest.mark.parametrize("tokens", [512, 1024, 1536, 2048, 4096, 8192])
@pytest.mark.parametrize("widths", [(4096,), (4096, 1024, 1024), (14336,)])
def test_no_block_has_much_more_than_another(tokens: int, widths: tuple[int, ...]) -> None:
    """On an H100 with two blocks on each of its multiprocessors: the largest share is at most 1.7 of the mean, or two blocks of 128 columns."""
    blocks, tiles = 264, tokens // 64
    run, cost = _long_run(tiles, widths, blocks, RUNS)
    largest = -(-tiles * sum(columns(widths, 128 * run)[2]) // blocks) * run
    assert largest <= max(2, 1.7 * tiles * sum(widths) / 128 / blocks)
    assert cost >= largest + cuda_kernels.FETCH
    assert _long_run(tiles, widths, blocks, WHOLE_PIECES)[1] >= cost


def test_only_small_ranks_are_shrunk_on_the_way_and_only_by_whole_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "kernels", lambda _: H100)
    linears = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))
    linears |= {"gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
    ahead = {}
    for rank in (16, 64):
        layout = SlotLayout.of(linears, 1)
        bank = SlotBank(layout, 1, rank, dtype=torch.bfloat16, device=torch.device("cpu"))
        for rows in (512, 1536, 2048):
            segments = Segments.allocate(rows, bank, engine="cuda")
            gate_up = layout.layers[0]["gate_up"]
            ahead[rank, rows] = cuda_kernels.shrinks_ahead(gate_up, segments, torch.bfloat16)
    # Of 1 536 rows pieces are 336 for 264 blocks; of 2 048 they are 448, and one block is to take two instead of 1.7.
    assert [case for case, done in ahead.items() if done] == [(16, 2048)] and len(ahead) == 6
    assert all(128 * run % cuda_kernels.PIECE == 0 for run in WHOLE_PIECES)
