"""`SharerEngine`: one sharer of a bundle by itself, without receiver and fuser, for a process or machine of its own.

In: the tokens that the sharer reads, as `Request.read_sharers` gets them. Out: the rows of its caches that the fuser
reads. They are those that the whole pipeline computes, bit for bit. Not covered:
planning a prompt, and bringing rows to another process.
"""

import os
import threading
from collections.abc import Sequence
from typing import Self

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.errors import UsageError
from engines.cores import check_threads
from engines.select import open_engine, wanted_engines
from runtime.checked import refuse_failed, warn_of_unchecked
from runtime.decoder import Decoder
from runtime.engine_loader import EngineLoader
from runtime.kept_rows import SharerRows
from runtime.prefill_work import PrefillWork
from runtime.prompt import ModelTokens
from runtime.slot_state import NO_TOKENS, Reuse, SlotState, Wide, reusable_sharer_rows

_READ = "sharer_"


class SharerEngine:
    """A sharer with a pool of slots, each of which keeps the rows of the last prompt that was read in it.

    A prompt is read in the slot whose rows it has most of in common, and only the others are computed. `prefill` may be
    called from several threads; prompts are read one at a time.
    """

    def __init__(self, number: int, sharer: Decoder, names: Sequence[str]) -> None:
        """`number` is the sharer's, `names` are those of the caches that its fuser reads."""
        self.number = number
        self._sharer = sharer
        self._wide = Wide(sharers={number: sharer.wide_head_size} if sharer.wide_head_size else {})
        self._names = tuple(names)
        # The least recently used slot first.
        self._held: dict[int, ModelTokens] = dict.fromkeys(range(sharer.pool.num_slots), NO_TOKENS)
        self._lock = threading.Lock()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        number: int,
        engine: str = "ort-cpu",
        precision: str | None = None,
        *,
        num_slots: int = 8,
        num_threads: int | None = None,
        allow_unchecked: bool = False,
        allow_failed: bool = False,
    ) -> Self:
        """Open the bundle at `path` and load its sharer `number`; all else is as in `C2CPipeline.from_bundle`.

        `num_slots` is how many prompts' rows are kept for others that begin alike. Raises `UsageError` where there is
        no such sharer, or its gates are all closed, so that it computes nothing.
        """
        if num_threads is not None:
            check_threads("num_threads", num_threads)
        bundle = Bundle.open(path)
        wanted_engines(bundle, engine, precision)
        sharers = bundle.manifest.sharers
        if not 0 <= number < len(sharers):
            raise UsageError(f"sharer {number}: {bundle.root} has {len(sharers)} sharers, numbered from 0")
        fuser = sharers[number].fuser_graph
        if fuser is None:
            raise UsageError(f"sharer {number}: all gates of its fuser are closed, so that it computes nothing")

        def load(record: EngineRecord) -> Decoder:
            if not allow_failed:
                refuse_failed(bundle, record)
            return EngineLoader(bundle, record, num_slots, num_threads).sharer(number)

        choice, sharer = open_engine(bundle, engine, precision, load)
        if not allow_unchecked:
            warn_of_unchecked(bundle, choice.record)
        read = (spec.name.removeprefix(_READ) for spec in fuser.inputs if spec.name.startswith(_READ))
        return cls(number, sharer, [name for name in read if name in sharer.pool.names])

    def prefill(self, tokens: ModelTokens) -> SharerRows:
        """The rows of `tokens`, copies of what lies in memory.

        Raises `UsageError` where they are none, or more than the capacity, and `C2CError` where an id is not one of the
        model's, or the engine fails.
        """
        num_tokens, capacity = len(tokens.ids), self._sharer.capacity
        if not 1 <= num_tokens <= capacity:
            raise UsageError(f"{num_tokens} tokens to read: expected 1 to {capacity}, the capacity")
        with self._lock:
            slot, first = self._begin(tokens)
            target, reuse = SlotState(sharers={self.number: tokens}), Reuse(sharer_rows={self.number: first})
            work = PrefillWork(target, reuse, wide=self._wide)
            while not work.done:
                piece = work.take()
                rows = slice(piece.start, piece.stop)
                self._sharer.run(slot, tokens.ids[rows], tokens.position_ids[rows], piece.start)
            self._held[slot] = tokens
            return SharerRows(self.number, tokens, self._sharer.pool.take_rows(self._names, slot, 0, num_tokens))

    def _begin(self, tokens: ModelTokens) -> tuple[int, int]:
        """The slot to read `tokens` in, which counts as empty from now on, and how many of its rows are there."""
        best = max(self._held, key=lambda slot: self._reusable_rows(self._held[slot], tokens))
        held, start = self._held[best], self._reusable_rows(self._held[best], tokens)
        # A prompt that goes on keeps its slot; one that only begins alike leaves the other its rows.
        slot = best if start >= len(held.ids) - 1 else next(iter(self._held))
        del self._held[slot]
        self._held[slot] = NO_TOKENS  # until it holds what is wanted
        if slot != best and start:
            pool = self._sharer.pool
            self._sharer.put_rows(slot, tokens.position_ids[:start], 0, pool.take_rows(pool.names, best, 0, start))
        return slot, start

    def _reusable_rows(self, held: ModelTokens, tokens: ModelTokens) -> int:
        return reusable_sharer_rows(held, tokens, self._sharer.wide_head_size)
