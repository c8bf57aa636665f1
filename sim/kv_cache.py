"""Paged KV memory: a pool of blocks, which request holds which, and which full blocks can be shared.

Rules: vLLM `v1/core/kv_cache_manager.py` (`KVCacheManager.allocate_slots`), `v1/core/block_pool.py` (`BlockPool`) and
`v1/core/kv_cache_utils.py` (`generate_block_hash_extra_keys`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from sim.state import RequestState
from workloads.requests import Request

BlockKey = tuple[int, ...]


def block_key(request: Request, index: int, block_size: int) -> BlockKey:
    """What identifies the tokens of a full block and all before it.

    (adapter, prefix, index) inside a common beginning: adapters never share keys and values, their projections differ.
    Past it (request, index): the tokens are the request's own, and stay so when it is preempted and comes back.
    """
    prefix, end = request.prefix, (index + 1) * block_size
    if prefix and end <= prefix[-1][0]:
        return (request.adapter, prefix[bisect_left(prefix, (end,))][1], index)
    return (request.request_id, index)


class BlockPool:
    """`num_gpu_blocks` blocks of `block_size` tokens, of which vLLM keeps one for itself (its null block).

    Blocks are taken chunk by chunk; nothing is set aside for outputs. With `prefix_caching` a full block stays findable
    after its release until it is given to somebody else.
    """

    def __init__(self, num_gpu_blocks: int, block_size: int, *, prefix_caching: bool = False) -> None:
        self.total = num_gpu_blocks - 1
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.owners = [0] * self.total
        # The front is given out first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.total))
        self._keys: dict[int, BlockKey] = {}
        # Two requests that computed the same block keep a copy each; the oldest is found first.
        self._cached: dict[BlockKey, OrderedDict[int, None]] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds, findable or not."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def lookup(self, state: RequestState) -> list[int]:
        """The cached blocks with which a waiting request begins; at least its last token is left to compute."""
        found: list[int] = []
        if not self.prefix_caching:
            return found
        for index in range((state.tokens - 1) // self.block_size):
            copies = self._cached.get(block_key(state.request, index, self.block_size))
            if not copies:
                break
            found.append(next(iter(copies)))
        return found

    def needed(self, state: RequestState, tokens: int, found: Sequence[int] = ()) -> int:
        """Free blocks it takes for `state` to hold `tokens` tokens: new ones, and found ones that nobody holds."""
        new = -(-tokens // self.block_size) - len(state.blocks)
        if not found:
            return max(0, new)
        return max(0, new - len(found)) + sum(not self.owners[block] for block in found)

    def grow(self, state: RequestState, tokens: int, found: Sequence[int] = ()) -> bool:
        """Give `state` the blocks for `tokens` tokens in all, first the `found` ones; False (no change) if they lack."""
        if found or tokens > len(state.blocks) * self.block_size:
            if self.needed(state, tokens, found) > len(self._free):
                return False
            self._hand_out(state, tokens, found)
        # vLLM registers blocks when they are scheduled, not when they are computed: the next request of the same step
        # finds them. Tokens that are still being sampled have no known value yet.
        if self.prefix_caching and tokens // self.block_size > state.registered:
            self.register(state, min(tokens, state.tokens))
        return True

    def _hand_out(self, state: RequestState, tokens: int, found: Sequence[int]) -> None:
        for block in found:
            self._free.pop(block, None)
            self.owners[block] += 1
        state.blocks.extend(found)
        state.registered += len(found)
        for _ in range(self.blocks_for(tokens) - len(state.blocks)):
            state.blocks.append(self._take())

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self.owners[block] = 1
        key = self._keys.pop(block, None)
        if key is not None:
            copies = self._cached[key]
            del copies[block]
            if not copies:
                del self._cached[key]
        return block

    def register(self, state: RequestState, tokens: int) -> None:
        """Make the full blocks among the first `tokens` tokens of `state` findable."""
        full = tokens // self.block_size
        if not self.prefix_caching or full <= state.registered:
            return
        for index in range(state.registered, full):
            key = block_key(state.request, index, self.block_size)
            self._keys[state.blocks[index]] = key
            self._cached.setdefault(key, OrderedDict())[state.blocks[index]] = None
        state.registered = full

    def release(self, state: RequestState) -> None:
        """Take back every block of `state`; those that nobody else holds become free."""
        # From last to first, so that the end of a prefix is given away before its beginning; blocks that cannot be
        # found again go to the front (`BlockPool.free_blocks`).
        for block in reversed(state.blocks):
            self.owners[block] -= 1
            if self.owners[block] == 0:
                self._free[block] = None
                if block not in self._keys:
                    self._free.move_to_end(block, last=False)
        state.blocks.clear()
        state.registered = 0
