"""One completion being generated: its tokens, how far they are computed, and the KV blocks they fill.

A sequence is passive: `scheduler` moves it between waiting and running, `engine` appends its tokens.
`num_computed <= len(tokens)` always; a running sequence with exactly one token left to compute decodes,
one with more prefills.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # sampling loads torch, which scheduling does without
    from penstock.engine.sampling import SamplingParams

NO_ROW: Final = -1
"""`Sequence.row` of a sequence that is not running."""

DIGEST_BYTES: Final = 16
"""Length of a block digest: 128 bits, so two different prefixes never meet in practice."""


class Sequence:
    """The state of completion `index` of request `request_id`."""

    __slots__ = (
        "arrival",
        "blocks",
        "digests",
        "epoch",
        "index",
        "limit",
        "noise_key",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_registered",
        "params",
        "preempted",
        "request_id",
        "row",
        "shares_tail",
        "siblings",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        arrival: int,
        limit: int,
        stop_ids: frozenset[int] = frozenset(),
        noise_key: int = 0,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.tokens = prompt.copy()
        """Prompt and completion."""
        self.num_prompt = len(prompt)
        self.params = params
        self.arrival = arrival
        """Place in the order of arrival; unique, and consecutive for the sequences of a request."""
        self.limit = limit
        """Length at which the sequence ends, prompt included."""
        self.stop_ids = stop_ids
        """Tokens that end the sequence."""
        self.noise_key = noise_key
        """64 bits that, with the position, determine every random draw of this sequence."""
        self.num_computed = 0
        self.num_cached = 0
        """Prompt tokens taken from the prefix cache when the sequence was first admitted."""
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        """Digest of each full block of `tokens` as far as it was needed."""
        self.num_registered = 0
        """Leading blocks that the prefix cache knows."""
        self.epoch = 0
        """The prefix cache's epoch in which the first block was computed."""
        self.row = NO_ROW
        self.siblings: list[Sequence] = []
        """Sequences of the same request that will be forked from this one when its prompt is computed."""
        self.shares_tail = False
        """The last block may be shared with a sibling: copy it before writing to it."""
        self.preempted = False

    @property
    def started(self) -> bool:
        """Whether it has generated a token."""
        return len(self.tokens) > self.num_prompt

    def prefix_digests(self, count: int, block_size: int) -> list[bytes]:
        """Digests of the first `count` blocks, each over its own tokens and all before them.

        All of those blocks must be full.
        """
        digests, tokens = self.digests, self.tokens
        for block in range(len(digests), count):
            parent = digests[-1] if digests else b""
            content = array("i", tokens[block * block_size : (block + 1) * block_size]).tobytes()
            digests.append(blake2b(parent + content, digest_size=DIGEST_BYTES).digest())
        return digests[:count]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.index}, tokens={len(self.tokens)}, "
            f"computed={self.num_computed}, blocks={len(self.blocks)}, row={self.row})"
        )
