"""The work of one prefill, piece by piece: which engine computes which rows, in which order.

Rows that were kept from a former prompt are put back first.
Sharers are prefilled up to the last fused token: their rows never change. The receiver is prefilled up to the end of
each fused section, whose rows are then fused before the next section attends to them (arXiv 2510.03215; the order is
the reference's).

Results do not depend on where a run of tokens is cut, but for what ONNX Runtime's `GroupQueryAttention` does:

- A call of a single token takes another path than several, which rounds otherwise. So no cut leaves a single token of a
  longer run.
- Tokens are taken by blocks (of twice the head size, which is a multiple of 8), and a block of one by that path too. So
  no call of a decoder has one token more than a multiple of 16.
- Where heads are wider than 128, sums are cut by the number of rows in the last block (`ATTENTION_BLOCK`). So such a
  sharer is cut between blocks, and such a receiver not at all, whatever a scheduler would like; `find_reuse` sees to it
  that the call in which such a run goes on has no last block of one token that the whole run has not.

Models whose heads are no multiple of 8 keep the portable `Attention` (`engines.ort`): there sums over a row depend on
the number of rows in use, by float32's rounding.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from runtime.slot_state import ATTENTION_BLOCK, FusedRows, Reuse, SlotState, Wide, takes_one_alone


@dataclass(frozen=True)
class RestoreSharer:
    """Put back rows [start, stop) of sharer `number`."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class RestoreReceiver:
    """Put back rows [start, stop) of the receiver."""

    start: int
    stop: int


@dataclass(frozen=True)
class PrefillSharer:
    """Compute rows [start, stop) of sharer `number`."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class AwaitSharer:
    """Take the rows of sharer `number`, which are computed elsewhere."""

    number: int
    start: int = 0
    stop: int = 1


@dataclass(frozen=True)
class PrefillReceiver:
    """Compute rows [start, stop) of the receiver; the last of them is closing padding if `closing`."""

    start: int
    stop: int
    closing: bool = False


@dataclass(frozen=True)
class FuseSection:
    """Fuse rows [start, stop), a part of `section`."""

    section: FusedRows
    start: int
    stop: int


Piece = RestoreSharer | RestoreReceiver | PrefillSharer | AwaitSharer | PrefillReceiver | FuseSection


class PrefillWork:
    """What is left to do for a slot to hold a target's rows."""

    def __init__(
        self,
        target: SlotState,
        reuse: Reuse,
        *,
        restore: bool = False,
        awaited: Iterable[int] = (),
        wide: Wide | None = None,
    ) -> None:
        """The work that `reuse` leaves; with `restore` what is reused is not in the slot yet.

        `awaited` are the sharers whose rows come from elsewhere.
        """
        self._wide = wide or Wide()
        self._pieces: deque[Piece] = deque()
        awaited = set(awaited)
        if restore:
            for number, num_rows in reuse.sharer_rows.items():
                if num_rows and number not in awaited:
                    self._pieces.append(RestoreSharer(number, 0, num_rows))
            if reuse.num_rows:
                self._pieces.append(RestoreReceiver(0, reuse.num_rows))
        for number, tokens in target.sharers.items():
            if number not in awaited:
                start = reuse.sharer_rows[number]
                if number in self._wide.sharers:
                    start = _start_of_block(start, len(tokens.ids))
                self._add(PrefillSharer(number, start, len(tokens.ids)), first=0)
        row = 0
        for index, section in enumerate(target.fused):
            if index >= reuse.num_sections:
                self._add(PrefillReceiver(max(row, reuse.num_rows), section.stop), first=row)
                # As late as can be: the receiver is prefilled meanwhile.
                self._pieces.extend(AwaitSharer(number) for number in sorted(awaited))
                awaited = set()
                self._add(FuseSection(section, section.start, section.stop), first=section.start)
            row = section.stop
        stop = target.num_rows + target.closing
        self._add(PrefillReceiver(max(row, reuse.num_rows), stop, closing=target.closing), first=row)

    def _add(self, piece: Piece, first: int) -> None:
        """Add a piece of the run that begins at row `first`, if anything of it is left."""
        if piece.stop - piece.start == 1 and piece.start > first:
            piece = replace(piece, start=piece.start - 1)  # computed again, rather than alone
        if piece.start < piece.stop:
            self._pieces.append(piece)

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return not self._pieces

    @property
    def next(self) -> Piece:
        """The piece that is next; not to be asked when done."""
        return self._pieces[0]

    @property
    def num_rows_left(self) -> int:
        """Rows that are still to be computed, of all models and fusers."""
        return sum(piece.stop - piece.start for piece in self._pieces if not isinstance(piece, AwaitSharer))

    def take(self, max_rows: int | None = None) -> Piece:
        """Take the next piece, or about as many of its first rows (at least 2, or 1 that is only put back)."""
        piece = self._pieces.popleft()
        length = piece.stop - piece.start
        taken = self._length_of_call(piece, length if max_rows is None else max_rows)
        if taken == length:
            return piece
        cut = piece.start + taken
        self._pieces.appendleft(replace(piece, start=cut))
        if isinstance(piece, PrefillReceiver):
            return replace(piece, stop=cut, closing=False)
        return replace(piece, stop=cut)

    def _length_of_call(self, piece: Piece, max_rows: int) -> int:
        """How many of a piece's rows one call computes."""
        length = piece.stop - piece.start
        if isinstance(piece, RestoreSharer | RestoreReceiver):
            return min(length, max(1, max_rows))
        if length <= 3 or (isinstance(piece, PrefillReceiver) and self._wide.receiver):
            return length
        if isinstance(piece, PrefillSharer) and piece.number in self._wide.sharers:
            return _length_between_blocks(length, max_rows)
        taken = min(length, max(2, max_rows))
        while length - taken == 1 or (takes_one_alone(taken) and not isinstance(piece, FuseSection)):
            taken -= 1
        return taken


def _start_of_block(row: int, stop: int) -> int:
    """Where to begin for rows [row, stop) to be in the blocks in which they are when all is computed at once."""
    if row == stop:
        return row
    start = row - row % ATTENTION_BLOCK
    return start - ATTENTION_BLOCK if start and stop - start == 1 else start


def _length_between_blocks(length: int, max_rows: int) -> int:
    if length <= max_rows:
        return length
    taken = max(1, max_rows // ATTENTION_BLOCK) * ATTENTION_BLOCK
    return taken if taken < length - 1 else length  # a single row may not be left
