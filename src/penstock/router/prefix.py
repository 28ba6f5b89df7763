"""Prefix affinity: requests whose prompts begin alike go to the engine that has that beginning in its cache.

It guarantees:
- the hash of a block depends on all blocks before it, so that equal hashes mean equal beginnings, but for
  collisions, which cost a cache miss and nothing else;
- requests of one prompt (the samples of a group) meet the same engine while it is not too busy: an engine
  with more than BOUND times the mean in flight, and SLACK more, is passed over;
- memory is bounded: MAX_BLOCKS blocks are remembered, the ones used longest ago are forgotten first.

Pure: no clock, no event loop. Sources: the hashing of blocks is that of vLLM's automatic prefix caching; the
index is a flat form of the tree of Zheng et al., "SGLang", 2024, section 4.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final, Generic
from zlib import crc32

from penstock.fleet.policy import BOUND, E, least_in_flight

BLOCK_TOKENS: Final = 16
"""Tokens of a block of token ids: vLLM's block."""
BLOCK_BYTES: Final = 128
"""Bytes of a block of text: about as much as a block of tokens."""
MAX_DEPTH: Final = 512
"""Blocks of a prompt that are looked at."""
MAX_BLOCKS: Final = 1 << 18
"""Blocks that are remembered; each takes about 150 bytes."""
MATCH: Final = 0.5
"""Part of a prompt's blocks that must be known for its sake to go where they are."""
SLACK: Final = 4
"""Requests above the bound that are let be, so that groups stay together while little is in flight."""


def token_blocks(tokens: Sequence[int]) -> list[int]:
    """Hashes of the beginnings of a prompt of token ids: one per whole block, and one of all if it is short.

    Raises OverflowError for what no token id can be.
    """
    data = array("I", tokens[: BLOCK_TOKENS * MAX_DEPTH]).tobytes()
    return _chain(data, 4 * BLOCK_TOKENS)


def text_blocks(text: bytes) -> list[int]:
    """Hashes of the beginnings of a text."""
    return _chain(text[: BLOCK_BYTES * MAX_DEPTH], BLOCK_BYTES)


def _chain(data: bytes, size: int) -> list[int]:
    hashes, last = [], 0
    for end in range(size, len(data) + 1, size):
        last = crc32(data[end - size : end], last)
        hashes.append(last << 32 | end)
    if not hashes and data:
        hashes.append(crc32(data) << 32 | len(data))
    return hashes


class PrefixIndex(Generic[E]):
    """Which endpoint was last given a prompt that begins with a block."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max = max_blocks
        self._owner: OrderedDict[int, E] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owner)

    def choose(self, free: Collection[E], blocks: Sequence[int], mean: float) -> E:
        """The endpoint of `free` for a prompt with these blocks. `mean`: in flight per endpoint, this request
        included."""
        owner = self._owner
        depth = _depth(owner, blocks)
        if depth and depth >= MATCH * len(blocks):
            known = owner[blocks[depth - 1]]
            if known in free and known.in_flight <= BOUND * mean + SLACK:
                self._learn(blocks, known, depth)
                return known
        chosen = least_in_flight(free, float)
        if depth < len(blocks):
            self._learn(blocks, chosen, depth)
        elif owner[blocks[-1]] not in free:
            self._learn(blocks, chosen, 0)
        return chosen

    def owner(self, blocks: Sequence[int]) -> E | None:
        """Where enough of a prompt with these blocks is known; None: nowhere."""
        depth = _depth(self._owner, blocks)
        return self._owner[blocks[depth - 1]] if depth and depth >= MATCH * len(blocks) else None

    def went(self, blocks: Sequence[int], endpoint: E) -> None:
        """A prompt with these blocks had to go to an endpoint: what nobody knew, it knows now."""
        depth = _depth(self._owner, blocks)
        if depth < len(blocks):
            self._learn(blocks, endpoint, depth)

    def forget(self, endpoint: E) -> None:
        """It has left."""
        for block in [block for block, owner in self._owner.items() if owner is endpoint]:
            del self._owner[block]

    def clear(self) -> None:
        """The engines' caches have been emptied."""
        self._owner.clear()

    def _learn(self, blocks: Sequence[int], endpoint: E, known: int) -> None:
        owner = self._owner
        for block in blocks[:known]:
            if block in owner:
                owner.move_to_end(block)
        for block in blocks[known:]:
            owner[block] = endpoint
        while len(owner) > self._max:
            owner.popitem(last=False)


def _depth(known: OrderedDict[int, E], blocks: Sequence[int]) -> int:
    """Number of leading blocks that are known; where some in between were forgotten, any known depth."""
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high + 1) // 2
        if blocks[middle - 1] in known:
            low = middle
        else:
            high = middle - 1
    return low
