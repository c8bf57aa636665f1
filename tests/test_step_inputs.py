"""A step laid out for the device: the short way of pure decodes, padding, and what is kept from step to step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backend.base import EngineLimits, StepBatch
from backend.decode_room import pure_decodes
from backend.geometry import load_geometry
from backend.live import LiveBackend
from backend.step_inputs import Padding, StepInputs, lay_out, power_of_two

SIZE, TILE = 16, 32


@st.composite
def steps(draw: st.DrawFn, longest: int = 90) -> StepBatch:
    count = draw(st.integers(1, 12))
    query = draw(st.lists(st.integers(1, longest), min_size=count, max_size=count))
    context = draw(st.lists(st.integers(0, 90), min_size=count, max_size=count))
    slots = draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
    samples = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    blocks = iter(draw(st.permutations(range(count * 12))))
    tables = tuple(tuple(next(blocks) for _ in range(-(-(q + c) // SIZE))) for q, c in zip(query, context, strict=True))
    decodes = draw(st.booleans())
    flags = tuple(q == 1 and c > 0 and draw(st.booleans()) for q, c in zip(query, context, strict=True))
    return StepBatch(tuple(query), tuple(context), tuple(slots), tuple(samples), tables, flags if decodes else ())


def as_array(batch: StepBatch) -> np.ndarray:
    tables = np.zeros((len(batch.query_lens), 12), dtype=np.int32)
    for row, blocks in enumerate(batch.block_tables):
        tables[row, : len(blocks)] = blocks
    return tables


@given(steps(), st.sampled_from([1, 4, 64, 512, 2048]))
def test_padding_is_known_before_the_layout(batch: StepBatch, size: int) -> None:
    inputs = lay_out(batch, as_array(batch), SIZE, TILE)
    padding = Padding.of(batch, size, TILE)
    assert padding.adapted == inputs.adapted
    if max(batch.query_lens) == 1:
        assert (padding.decode_tiles, padding.prefill_tiles, padding.samples) == (size, 0, size)
    else:
        assert padding.decode_tiles == power_of_two(len(inputs.decode_tiles))
        assert padding.prefill_tiles == power_of_two(len(inputs.prefill_tiles))
        assert padding.samples == power_of_two(len(inputs.sample_rows))


@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=6
    )
)
def test_block_tables_are_right_whatever_the_rows_held(worlds: list[list[list[int]]]) -> None:
    backend = world()
    backend._held_tables = [()] * 12
    for tables in worlds:
        count = len(tables)
        context = tuple(len(blocks) * SIZE - 1 for blocks in tables)
        blocks = tuple(tuple(row) for row in tables)
        backend.layout(StepBatch((1,) * count, context, (-1,) * count, (True,) * count, blocks))
        for row, expected in enumerate(blocks):
            assert tuple(backend._host_tables[row, : len(expected)].tolist()) == expected


@given(st.lists(steps(longest=4), min_size=1, max_size=6))
def test_the_device_sees_every_step_as_it_was_laid_out(batches: list[StepBatch]) -> None:
    """Steps of shapes that were seen before and of new ones, one after the other in the same memory."""
    backend = world()
    for batch in (*batches, *batches):
        inputs = lay_out(batch, as_array(batch), SIZE, TILE)
        seen = backend._pack(inputs)
        backend.hold_tables(batch)
        backend._upload(seen)
        for row, blocks in enumerate(batch.block_tables):
            assert tuple(backend._tables[row, : len(blocks)].tolist()) == blocks
        assert seen.adapted == inputs.adapted
        for name, array in zip(StepInputs.__slots__, inputs.arrays(), strict=True):
            assert getattr(seen, name).tolist() == array.tolist()


_worlds: list[LiveBackend] = []


def world() -> LiveBackend:
    if not _worlds:
        limits = EngineLimits(2, 8, 12, 64, 96, SIZE, 0.9)
        _worlds.append(LiveBackend(load_geometry("tiny"), limits, 16, device="cpu"))
    return _worlds[0]


@given(st.lists(steps(longest=1), min_size=1, max_size=6), st.lists(st.sampled_from([12, 16]), min_size=6, max_size=6))
def test_pure_decodes_lie_as_any_step_would(batches: list[StepBatch], sizes: list[int]) -> None:
    """One after the other, of other sizes and with other steps between, as a step that only moves on leaves much as it is."""
    backend = world()
    for batch, size in zip(batches, sizes, strict=False):
        yes, context = (True,) * len(batch.samples), tuple(max(1, tokens) for tokens in batch.context_lens)
        ongoing = replace(batch, samples=yes, decodes=yes, context_lens=context)
        for step in (ongoing, replace(ongoing, slots=batch.slots[::-1]), ongoing):
            assert pure_decodes(step)
            padding = Padding.of(step, size, TILE)
            seen = backend._laid_out(step, padding)
            assert backend._lies is not None, "the short way"
            lain = backend._host_packed[: seen.cells].clone()
            expected = lay_out(step, as_array(step), SIZE, TILE).padded(padding, backend.num_gpu_blocks)
            assert (lain.numpy() == np.concatenate([array.ravel() for array in expected.arrays()])).all()
        backend._pack(backend.layout(batch))


@given(steps(longest=1))
def test_without_tiles_of_decodes_they_lie_in_long_ones(batch: StepBatch) -> None:
    """As deterministic steps do, whose decodes go through one kernel with prompts."""
    backend = world()
    ongoing = replace(batch, samples=(True,) * len(batch.samples), decodes=())
    short_tile, backend._short_tile = backend._short_tile, 0
    try:
        padding = Padding.of(ongoing, 16, backend.decoder.long_tile, 0)
        seen = backend._laid_out(ongoing, padding)
    finally:
        backend._short_tile = short_tile
    lain = backend._host_packed[: seen.cells].clone()
    inputs = lay_out(ongoing, as_array(ongoing), SIZE, backend.decoder.long_tile, 0)
    expected = inputs.padded(padding, backend.num_gpu_blocks)
    assert (lain.numpy() == np.concatenate([array.ravel() for array in expected.arrays()])).all()


@given(steps(longest=2))
def test_only_requests_that_all_go_on_are_pure_decodes(batch: StepBatch) -> None:
    ongoing = all(batch.decodes) if batch.decodes else min(batch.context_lens) > 0
    assert pure_decodes(batch) == (ongoing and max(batch.query_lens) == 1 and all(batch.samples))
