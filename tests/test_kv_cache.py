"""KV blocks and the prefix cache: what is found, what is shared, what is given away first, and I5 always."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sim.config import EngineConfig
from sim.errors import IntegrityError
from sim.integrity import check_blocks
from sim.kv_cache import BlockPool
from sim.scheduler import Scheduler
from sim.state import RequestState
from workloads.requests import Request


def request(index: int, prompt: int, adapter: int = 1, prefix: int = 7, shared: int | None = None) -> RequestState:
    tokens = prompt if shared is None else shared
    return RequestState(
        Request(index, 0.0, prompt, 8, adapter, 0, ((tokens, prefix),) if prefix >= 0 < tokens else ()), 8
    )


def pool(blocks: int = 11) -> BlockPool:
    return BlockPool(blocks, 4, prefix_caching=True)


def test_one_block_is_never_given_out() -> None:
    assert BlockPool(11, 4).free == 10


def test_a_common_beginning_is_found_within_an_adapter_only() -> None:
    p = pool()
    first = request(0, 10)
    assert p.grow(first, 10)
    assert p.lookup(request(1, 10)) == first.blocks[:2]
    assert p.lookup(request(2, 10, adapter=2)) == []
    assert p.lookup(request(3, 10, prefix=8)) == []
    assert p.lookup(request(4, 10, shared=7)) == first.blocks[:1]


def test_the_last_token_is_always_computed() -> None:
    p = pool()
    assert p.grow(request(0, 8), 8)
    assert len(p.lookup(request(1, 8))) == 1


def test_without_prefix_caching_nothing_is_found() -> None:
    p = BlockPool(11, 4)
    assert p.grow(request(0, 10), 10)
    assert p.lookup(request(1, 10)) == []


def test_released_blocks_stay_findable_until_they_are_given_away_from_the_end() -> None:
    p = pool(5)
    first = request(0, 16)
    assert p.grow(first, 16)
    blocks = list(first.blocks)
    p.release(first)
    assert p.free == 4
    assert p.lookup(request(1, 16)) == blocks[:3]
    other = request(2, 6, prefix=9)
    assert p.grow(other, 6)
    assert other.blocks == [blocks[3], blocks[2]]
    assert p.lookup(request(1, 16)) == blocks[:2]


def test_blocks_found_in_the_free_list_count_as_needed() -> None:
    p = pool(5)
    first = request(0, 16)
    assert p.grow(first, 16)
    p.release(first)
    second = request(1, 16)
    found = p.lookup(second)
    assert p.needed(second, 16, found) == 4
    assert p.grow(second, 16, found)
    assert p.needed(request(2, 16), 16, found) == 1


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    p = pool()
    state = request(0, 6, prefix=-1, shared=0)
    state.emitted = 4
    assert p.grow(state, 9)
    mine = state.blocks[:2]
    p.release(state)
    assert p.lookup(state) == mine
    assert p.lookup(request(1, 10, prefix=-1, shared=0)) == []


def test_a_session_finds_what_was_said_before_and_a_sibling_only_the_common_root() -> None:
    p = pool(20)
    first = RequestState(Request(0, 0.0, 10, 8, 1, 0, ((5, 0), (18, 1))), 8)
    assert p.grow(first, 10)
    first.emitted = 7
    assert p.grow(first, 17)
    p.release(first)
    turn = RequestState(Request(1, 1.0, 22, 8, 1, 0, ((5, 0), (30, 1))), 8)
    assert len(p.lookup(turn)) == 4
    sibling = RequestState(Request(2, 1.0, 22, 8, 1, 0, ((5, 0), (30, 2))), 8)
    assert len(p.lookup(sibling)) == 1


def test_the_check_notices_a_miscounted_block() -> None:
    scheduler = Scheduler(EngineConfig(), BlockPool(10, 16, prefix_caching=True))
    scheduler.add(request(0, 20))
    scheduler.schedule()
    check_blocks(scheduler)
    scheduler.pool.owners[scheduler.running[0].blocks[0]] += 1
    with pytest.raises(IntegrityError, match="I5"):
        check_blocks(scheduler)


class Blocks(RuleBasedStateMachine):
    """Requests come, grow and go in any order; every block is free or has exactly the owners that hold it."""

    @initialize(blocks=st.integers(4, 20))
    def start(self, blocks: int) -> None:
        self.pool = pool(blocks)
        self.holding: list[RequestState] = []
        self.count = 0

    @rule(prompt=st.integers(1, 30), adapter=st.integers(0, 2), prefix=st.integers(-1, 1), data=st.data())
    def arrive(self, prompt: int, adapter: int, prefix: int, data: st.DataObject) -> None:
        state = request(self.count, prompt, adapter, prefix, data.draw(st.integers(0, prompt)))
        self.count += 1
        found = self.pool.lookup(state)
        assert len(found) * 4 < prompt
        for other in self.holding:
            if other.adapter != adapter:
                assert not set(found) & set(other.blocks), "I5: found another adapter's block"
        tokens = data.draw(st.integers(len(found) * 4 + 1, prompt))
        free, need = self.pool.free, self.pool.needed(state, tokens, found)
        assert self.pool.grow(state, tokens, found) == (need <= free)
        if need <= free:
            assert self.pool.free == free - need
            state.computed = tokens
            self.holding.append(state)
        else:
            assert (state.blocks, self.pool.free) == ([], free)

    @precondition(lambda self: getattr(self, "holding", None))
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        state = data.draw(st.sampled_from(self.holding))
        if state.computed == state.tokens and state.emitted < 8:
            state.emitted += 1
        if state.computed < state.tokens:
            more = data.draw(st.integers(state.computed + 1, state.tokens))
            if self.pool.grow(state, more):
                state.computed = more

    @precondition(lambda self: getattr(self, "holding", None))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        state = data.draw(st.sampled_from(self.holding))
        self.holding.remove(state)
        self.pool.release(state)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "pool"):
            return
        held: dict[int, list[RequestState]] = {}
        for state in self.holding:
            assert len(set(state.blocks)) == len(state.blocks) == self.pool.blocks_for(state.computed)
            for block in state.blocks:
                held.setdefault(block, []).append(state)
        assert self.pool.used == len(held)
        assert self.pool.used + self.pool.free == self.pool.total
        for block, states in held.items():
            assert self.pool.owners[block] == len(states)
            assert len({s.adapter for s in states}) == 1
            assert len({s.request.prefix[0][1] if s.request.prefix else -1 for s in states}) == 1
        assert not any(self.pool.owners[b] for b in range(self.pool.total) if b not in held)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
