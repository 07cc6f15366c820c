"""The work of one prefill, piece by piece: which engine computes which rows, in which order.

Sharers are prefilled up to the last fused token: their rows never change. The receiver is prefilled up to the end of
each fused section, whose rows are then fused before the next section attends to them (arXiv 2510.03215; the order is
the reference's).

Results do not depend on where a run of tokens is cut, but for one thing: engines compute a single token by another path
than several, which rounds otherwise. So no cut leaves a single token of a longer run; and no call of a decoder has one
token more than a multiple of 16, as ONNX Runtime's attention takes tokens by blocks (of twice the head size, which is a
multiple of 8) and a block of one by that path too. That holds for `GroupQueryAttention`; where a model's heads keep the
portable `Attention` (`engines.ort`), sums over a row depend on the number of rows in use, by float32's rounding.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from runtime.slot_state import FusedRows, Reuse, SlotState

_ATTENTION_BLOCK = 16


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


Piece = PrefillSharer | AwaitSharer | PrefillReceiver | FuseSection


class PrefillWork:
    """What is left to do for a slot to hold a target's rows."""

    def __init__(self, target: SlotState, reuse: Reuse, *, closing_padding: bool, awaited: Iterable[int] = ()) -> None:
        """The work that `reuse` leaves; `awaited` are the sharers whose rows come from elsewhere.

        With `closing_padding` the prompt ends in one more row, of padding.
        """
        self._pieces: deque[Piece] = deque()
        awaited = set(awaited)
        for number, tokens in target.sharers.items():
            if number not in awaited:
                self._add(PrefillSharer(number, reuse.sharer_rows[number], len(tokens.ids)), first=0)
        row = 0
        for index, section in enumerate(target.fused):
            if index >= reuse.num_sections:
                self._add(PrefillReceiver(max(row, reuse.num_rows), section.stop), first=row)
                # As late as can be: the receiver is prefilled meanwhile.
                self._pieces.extend(AwaitSharer(number) for number in sorted(awaited))
                awaited = set()
                self._add(FuseSection(section, section.start, section.stop), first=section.start)
            row = section.stop
        stop = len(target.receiver.ids) + closing_padding
        self._add(PrefillReceiver(max(row, reuse.num_rows), stop, closing=closing_padding), first=row)

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
        """Take the next piece, or about as many of its first rows (at least 2)."""
        piece = self._pieces.popleft()
        length = piece.stop - piece.start
        taken = _length_of_call(length, length if max_rows is None else max_rows, isinstance(piece, FuseSection))
        if taken == length:
            return piece
        cut = piece.start + taken
        self._pieces.appendleft(replace(piece, start=cut))
        if isinstance(piece, PrefillReceiver):
            return replace(piece, stop=cut, closing=False)
        return replace(piece, stop=cut)


def _length_of_call(length: int, max_rows: int, fusing: bool) -> int:
    """How many of a run's `length` rows one call computes."""
    if length <= 3:
        return length
    taken = min(length, max(2, max_rows))
    while length - taken == 1 or (taken % _ATTENTION_BLOCK == 1 and not fusing):
        taken -= 1
    return taken
