"""The prefix cache of a simulated engine: which blocks of prompts it has computed and not yet thrown away."""

from __future__ import annotations

from collections import OrderedDict

BLOCK_CHARACTERS = 64       # some 16 tokens, as vLLM's blocks have


class PrefixCache:
    """Blocks are known by themselves and all before them; the one not used for longest goes first."""

    def __init__(self, tokens: int) -> None:
        self._most = tokens // 16
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def hits(self, prompt: str, tokens: int) -> int:
        """How many of a prompt's tokens need no computing; afterwards all of its blocks are there."""
        if self._most == 0 or not prompt:
            return 0
        known, found, seen = True, 0, 0
        for end in range(BLOCK_CHARACTERS, len(prompt) + 1, BLOCK_CHARACTERS):
            seen = hash((seen, prompt[end - BLOCK_CHARACTERS:end]))
            known = known and seen in self._blocks
            found += known
            self._blocks[seen] = None
            self._blocks.move_to_end(seen)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
        return min(tokens, round(tokens * found * BLOCK_CHARACTERS / len(prompt)))
