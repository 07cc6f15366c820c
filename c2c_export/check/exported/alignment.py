"""A bundle's alignment table, against one that is compiled anew, entry by entry.

In: the table's file, the new table, and the tokenizers of both models. Out: a `Divergence` that names the first wrong
token and what the table looks like, or None.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from c2c_export.check_record import Divergence
from c2c_export.errors import BundleError
from c2c_export.tokenizer import BundledTokenizer


def check_alignment(
    file: Path, expected: NDArray[np.int32], receiver: BundledTokenizer, sharer: BundledTokenizer
) -> Divergence | None:
    """Compare the table in `file`, of `sharer`, with the `expected` one. Raises `BundleError` if it is none."""
    try:
        found: NDArray[np.generic] = np.load(file)
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: not a table of token ids ({error}); export the bundle again") from error
    name = f"alignment/{file.name}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        message = f"{name} holds {found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
        return Divergence(message=message)
    wrong = np.flatnonzero(found != expected)
    if not len(wrong):
        return None
    first = int(wrong[0])
    message = (
        f"{name}: {len(wrong)} of {len(expected)} entries are wrong, the first is that of receiver token {first} "
        f"({_token(receiver, first)}): it is {found[first]} ({_token(sharer, int(found[first]))}), expected "
        f"{expected[first]} ({_token(sharer, int(expected[first]))}){_pattern(found, expected)}"
    )
    return Divergence(message=message)


def _token(tokenizer: BundledTokenizer, token: int) -> str:
    text = tokenizer.backend.id_to_token(token) if token >= 0 else None
    return "no token" if text is None else repr(text)


def _pattern(found: NDArray[np.generic], expected: NDArray[np.int32]) -> str:
    is_shifted = any(np.array_equal(found, np.roll(expected, by)) for by in (1, -1))
    # The entry that was pushed out at one end may be gone.
    is_shifted |= np.array_equal(found[1:], expected[:-1]) or np.array_equal(found[:-1], expected[1:])
    if is_shifted:
        return ": the whole table is shifted by one entry"
    if np.array_equal(found, expected + 1) or np.array_equal(found, expected - 1):
        return ": every id is off by one"
    return ""
