"""Paged KV memory: a pool of blocks, and which request holds which."""

from __future__ import annotations

from sim.state import RequestState


class BlockPool:
    """`total` blocks of `block_size` tokens. Blocks are taken chunk by chunk; nothing is reserved for outputs.

    Rule: vLLM `v1/core/kv_cache_manager.py`, `KVCacheManager.allocate_slots`, without prefix caching.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def grow(self, state: RequestState, tokens: int) -> bool:
        """Give `state` the blocks for `tokens` tokens in all; False (and no change) if too few are free."""
        need = self.blocks_for(tokens) - len(state.blocks)
        if need > len(self._free):
            return False
        for _ in range(need):
            state.blocks.append(self._free.pop())
        return True

    def release(self, state: RequestState) -> None:
        """Take back every block of `state`."""
        self._free.extend(reversed(state.blocks))
        state.blocks.clear()
