"""What a fuser's divergence looks like.

In: what was compared, and the trained fuser, to try guesses on. Out: a sentence, or none. Guesses, of what was added to
the cache: nothing; the value's correction in place of the key's; that of a neighbouring sharer layer; another token's.
"""

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.comparing import layer_of, rows_of
from c2c_export.check.diagnosis.fits import Diverged, explains
from c2c_export.check.runner import Trained

_MAX_SHIFT = 2


def diagnose_fuser(diverged: Diverged, trained: Trained) -> str:
    """One sentence about the first output that diverged; empty where no guess fits."""
    return _not_added(diverged) or _other_kind(diverged) or _shifted_layer(diverged, trained) or _shifted_rows(diverged)


def _not_added(diverged: Diverged) -> str:
    found = _added(diverged, diverged.found[diverged.output], diverged.output)
    if explains(np.zeros_like(found), found, 1.0, diverged.result.tolerance) and not np.any(found):
        return "Nothing is added, although its gate is open: a gate closed, or a branch removed."
    return ""


def _other_kind(diverged: Diverged) -> str:
    kind, _, layer = diverged.output.partition(".")
    other = f"{'value' if kind == 'key' else 'key'}.{layer}"
    if other not in diverged.expected:
        return ""
    if _fits(diverged, _added(diverged, diverged.expected[other], other)):
        return f"What is added to it is what belongs to the {other.partition('.')[0]}: the two are swapped."
    return ""


def _shifted_layer(diverged: Diverged, trained: Trained) -> str:
    for shift in sorted(range(-_MAX_SHIFT, _MAX_SHIFT + 1), key=abs):
        if shift:
            outputs = trained.run(_with_sharer_layers_shifted(diverged, shift))
            if _fits(diverged, _added(diverged, outputs[diverged.output], diverged.output)):
                where = "above" if shift > 0 else "below"
                layers = "layer" if abs(shift) == 1 else "layers"
                return f"It is corrected from the sharer's cache {abs(shift)} {layers} {where}: a shifted layer map."
    return ""


def _with_sharer_layers_shifted(diverged: Diverged, shift: int) -> dict[str, NDArray[np.float32]]:
    inputs = dict(diverged.feed.inputs)
    for name in diverged.feed.inputs:
        kind, _, layer = name.partition(".")
        shifted = f"{kind}.{int(layer) + shift}" if kind.startswith("sharer_") and layer else ""
        if shifted in diverged.feed.inputs:
            inputs[name] = diverged.feed.inputs[shifted]
    return inputs


def _shifted_rows(diverged: Diverged) -> str:
    expected = _added(diverged, diverged.expected[diverged.output], diverged.output)
    found = _added(diverged, diverged.found[diverged.output], diverged.output)
    if expected.shape[2] < 3:
        return ""
    error, tolerance = diverged.result.relative_error, diverged.result.tolerance
    for what, guess, rows in (
        ("next", expected[:, :, 1:], found[:, :, :-1]),
        ("previous", expected[:, :, :-1], found[:, :, 1:]),
    ):
        if explains(guess, rows, error, tolerance):
            return f"To each row is added what belongs to the {what} one: rows shifted by a token."
    return ""


def _fits(diverged: Diverged, guess: NDArray[np.float32]) -> bool:
    found = _added(diverged, diverged.found[diverged.output], diverged.output)
    return explains(guess, found, diverged.result.relative_error, diverged.result.tolerance)


def _added(diverged: Diverged, cache: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """What was added to the written rows [1,H,N,D] of the cache `name`."""
    assert layer_of(name) >= 0
    written = diverged.feed.written
    return rows_of(cache, written) - rows_of(diverged.feed.inputs[f"past_{name}"], written)
