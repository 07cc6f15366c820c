"""Rows of former prompts, kept to begin further ones with: shared system prompts, few-shot turns, turns of a chat.

Kept are host copies, so that slots are free at once. What is reused is exact (`runtime.slot_state`), in fused sections
too: their unfused rows are kept beside the final ones, so that a section that goes on differently is fused anew without
being prefilled anew. Rows of generated tokens are not kept: a step of one token rounds otherwise than a prompt does, so
that an answer would depend on what happens to be kept.

Least recently used prompts go first when a budget of memory is exceeded. Not thread-safe.
"""

from c2c_export.errors import UsageError
from runtime.kept_rows import KeptRows
from runtime.prefill import Prefiller
from runtime.slot_state import Reuse, SlotState, find_reuse

_WORTHWHILE_ROWS = 8
"""Fewer are computed faster than they are looked for, copied and kept."""


class PrefixCache:
    """Prompts' rows, by recent use, of one bundle's engine."""

    def __init__(self, prefiller: Prefiller, max_bytes: int) -> None:
        """Keep at most `max_bytes`; 0 keeps nothing. Raises `UsageError` for a negative number."""
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise UsageError(f"prefix_cache_bytes: {max_bytes!r} is not allowed; expected 0 (keep nothing) or more")
        self._prefiller, self._max_bytes = prefiller, max_bytes
        self._kept: list[KeptRows] = []
        self.num_bytes = 0
        """What is kept now."""

    def __len__(self) -> int:
        return len(self._kept)

    def worth_keeping(self, target: SlotState) -> bool:
        """Whether a prompt is long enough to be kept, and would fit if all else went."""
        if target.num_rows < _WORTHWHILE_ROWS:
            return False
        receiver = self._prefiller.receiver.pool
        fused_rows = sum(section.stop - section.start for section in target.fused)
        num_bytes = (target.num_rows + fused_rows) * receiver.row_bytes
        for number, tokens in target.sharers.items():
            num_bytes += len(tokens.ids) * self._prefiller.sharers[number].pool.row_bytes
        return num_bytes <= self._max_bytes

    def find(self, target: SlotState) -> tuple[KeptRows | None, Reuse]:
        """The prompt that saves most, and what of it; None and nothing where none saves anything."""
        wide = self._prefiller.wide
        best, best_reuse = None, find_reuse(SlotState(), target, wide=wide)
        for kept in self._kept:
            reuse = find_reuse(kept.state, target, kept.unfused, wide)
            if reuse.num_rows >= _WORTHWHILE_ROWS and _worth(reuse) > _worth(best_reuse):
                best, best_reuse = kept, reuse
        if best is not None:
            self._kept.remove(best)
            self._kept.append(best)
        return best, best_reuse

    def add(self, kept: KeptRows) -> None:
        """Keep a prompt, in place of those that are its beginning; what is used least goes where it does not fit."""
        if kept.num_bytes > self._max_bytes:
            return
        for old in list(self._kept):
            covered = find_reuse(kept.state, old.state, kept.unfused, self._prefiller.wide)
            if covered.num_rows >= old.state.num_rows - 1 and dict(covered.sharer_rows) == {
                number: len(tokens.ids) for number, tokens in old.state.sharers.items()
            }:
                self._remove(old)
        self._kept.append(kept)
        self.num_bytes += kept.num_bytes
        while self.num_bytes > self._max_bytes:
            self._remove(self._kept[0])

    def _remove(self, kept: KeptRows) -> None:
        self._kept.remove(kept)
        self.num_bytes -= kept.num_bytes


def _worth(reuse: Reuse) -> tuple[int, int]:
    return reuse.num_rows + sum(reuse.sharer_rows.values()), reuse.num_sections
