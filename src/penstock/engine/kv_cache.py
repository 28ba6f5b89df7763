"""Which KV blocks are free, held or cached: reference counts and the prefix cache, without the memory itself.

Every block is in exactly one state: *held* (reference count at least 1), *idle* (count 0, its content still
findable by digest, evicted in order of release), or *free* (count 0, content unknown). A block found by
digest is full and is never written again. Free blocks are reused last in, first out, so a small load
touches little memory.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Blocks 0 … num_blocks-1 of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self.epoch = 0
        """Counts `forget`: content computed in an earlier epoch must not be registered."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks with a reference."""
        return self.num_blocks - self.num_free

    def allocate(self) -> int:
        """A block with one reference and unknown content; the longest idle one if none is free.

        The caller has made sure that `num_free` is not 0.
        """
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._forget_block(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a held or idle block."""
        if self.refs[block] == 0:
            del self._idle[block]
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """Take back one reference."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def release_all(self, blocks: list[int]) -> None:
        """Release a sequence's blocks, last first: a block is evicted before the blocks it continues."""
        for block in reversed(blocks):
            self.release(block)

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block findable. The first block of equal content stays the one that is found."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle_among(self, blocks: list[int]) -> int:
        """How many of these blocks nobody holds."""
        refs = self.refs
        return sum(1 for block in blocks if refs[block] == 0)

    def forget(self) -> None:
        """Drop all cached content, that of held blocks included: nothing computed so far is found again."""
        for block in self._by_digest.values():
            self._digests[block] = None
        self._by_digest.clear()
        self._free.extend(self._idle)
        self._idle.clear()
        self.epoch += 1

    def _forget_block(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None
