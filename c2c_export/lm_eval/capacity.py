"""Make requests fit a bundle's capacity, as the harness's own models make them fit theirs, and say so once.

In: numbers of tokens. Out: what is left of contexts and limits. A cache holds every token but an answer's last one.
"""

import logging

from c2c_export.errors import UsageError

_logger = logging.getLogger(__name__)


class Capacity:
    """Of one batch of requests: `rows` tokens, the bundle's capacity; counts what had to be cut."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._num_cut_contexts = 0
        self._num_cut_answers = 0

    def cut(self, context_ids: list[int], num_more: int) -> list[int]:
        """The end of a raw context that `num_more` tokens can follow. Raises `UsageError` if nothing of it is left."""
        num_kept = self._rows - num_more + 1
        if num_kept < 1:
            raise UsageError(
                f"{num_more} tokens after the context leave no room for it in the bundle's capacity of {self._rows}; "
                "lower max_gen_toks, or export with a larger --max-length"
            )
        self._num_cut_contexts += len(context_ids) > num_kept
        return context_ids[-num_kept:]

    def check(self, num_rows: int, num_more: int) -> None:
        """Raise `UsageError` if `num_more` tokens cannot follow a chat of `num_rows`."""
        if num_rows + num_more - 1 > self._rows:
            raise UsageError(
                f"a chat of {num_rows} tokens and a continuation of {num_more} exceed the bundle's capacity of "
                f"{self._rows}; export with a larger --max-length"
            )

    def room(self, num_rows: int, num_wanted: int) -> int:
        """How many of `num_wanted` tokens can follow a chat of `num_rows`. Raises `UsageError` if none can."""
        self.check(num_rows, 1)
        room = min(num_wanted, self._rows - num_rows + 1)
        self._num_cut_answers += room < num_wanted
        return room

    def warn(self) -> None:
        """Log how many contexts and answers were cut, if any."""
        if self._num_cut_contexts:
            _logger.warning(
                "%d contexts exceed the bundle's capacity of %d tokens and are cut from the left",
                self._num_cut_contexts,
                self._rows,
            )
        if self._num_cut_answers:
            _logger.warning(
                "%d answers may have fewer tokens than max_gen_toks, as the bundle's capacity is %d",
                self._num_cut_answers,
                self._rows,
            )
