"""What a decoder's divergence looks like.

In: what was compared, and the trained decoder, to try guesses on. Out: a sentence. Guesses in this order: keys and
values swapped; keys rotated by other angles; a mask of one slot; else the part of the model between the last output
that agrees and the first that does not.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.comparing import LOGITS, layer_of
from c2c_export.check.diagnosis.fits import Diverged, explains, pair_lengths
from c2c_export.check.runner import Trained


def diagnose_decoder(diverged: Diverged, trained: Trained) -> str:
    """One sentence or two about the first output that diverged."""
    return _swapped(diverged) or _rotated(diverged) or _masked(diverged, trained) or _between(diverged)


def _swapped(diverged: Diverged) -> str:
    layer = layer_of(diverged.output)
    key, value = f"key.{layer}", f"value.{layer}"
    if layer < 0 or not (diverged.failed(key) and diverged.failed(value)):
        return ""
    keys, values = diverged.found_rows(key), diverged.found_rows(value)
    expected_keys, expected_values = diverged.expected_rows(key), diverged.expected_rows(value)
    error, tolerance = diverged.result.relative_error, diverged.result.tolerance
    if explains(expected_values, keys, error, tolerance) and explains(expected_keys, values, error, tolerance):
        return "Its keys are the expected values and its values the expected keys: the two are swapped."
    # Where the matrices are swapped, the rotation comes after: it keeps the lengths of the pairs that it turns.
    if explains(pair_lengths(expected_values), pair_lengths(keys), error, tolerance) and explains(
        pair_lengths(expected_keys), pair_lengths(values), error, tolerance
    ):
        return (
            "Up to the rotation, its keys are the expected values and its values the expected keys: they are swapped."
        )
    return ""


def _rotated(diverged: Diverged) -> str:
    layer = layer_of(diverged.output)
    if not diverged.output.startswith("key") or diverged.failed(f"value.{layer}") or diverged.feed.positions is None:
        return ""
    keys, expected = diverged.found_rows(diverged.output), diverged.expected_rows(diverged.output)
    error, tolerance = diverged.result.relative_error, diverged.result.tolerance
    if not explains(pair_lengths(expected), pair_lengths(keys), error, tolerance):
        return ""
    what = "Its keys are as long as expected, pair by pair, but turned by other angles"
    at_zero = np.broadcast_to((diverged.feed.positions == 0)[:, None], diverged.result.errors.shape)
    if not at_zero.any():
        return f"{what}: the rotary base, its frequencies or the positions."
    if diverged.result.errors[at_zero].max() <= tolerance:
        return f"{what}, except at position 0: the rotary base or its frequencies."
    return f"{what}, also at position 0: the positions."


def _masked(diverged: Diverged, trained: Trained) -> str:
    """Of a step of several slots of which one is off: which rows that slot seems to see."""
    by_slot = diverged.result.errors.max(axis=(1, 2))
    off = np.flatnonzero(by_slot > diverged.result.tolerance)
    if len(by_slot) < 2 or len(off) == len(by_slot):
        return ""
    slots = ", ".join(map(str, off))
    only = f"Only slot{'s' if len(off) > 1 else ''} {slots} of {len(by_slot)} off: a mask, a length or a position"
    slot = int(off[0])
    row = diverged.feed.written[slot].start
    capacity = next(array.shape[2] for name, array in diverged.feed.inputs.items() if name.startswith("past_"))
    before = list(range(row))
    guesses: list[tuple[str, Sequence[int], bool]] = [
        ("its newest token is not seen", before, False),
        ("the newest of its earlier rows is not seen", before[:-1], True),
        ("its first row is not seen", before[1:], True),
    ]
    if row + 2 <= capacity:
        guesses.append(("it sees the row behind its own", [*before, row + 1], True))
    for sentence, rows, sees_itself in guesses:
        if len(rows) < capacity and (rows or sees_itself):
            guess = _seeing(diverged, trained, slot, rows, sees_itself)
            found = diverged.found[diverged.output][slot]
            if diverged.output != LOGITS:
                found = found[:, row : row + 1]
            if explains(guess, found, float(by_slot[slot]), diverged.result.tolerance):
                return f"{only}. In slot {slot}, {sentence}."
    return f"{only}."


def _seeing(
    diverged: Diverged, trained: Trained, slot: int, rows: Sequence[int], sees_itself: bool
) -> NDArray[np.float32]:
    """The output of `slot` if its token saw these of the rows and, perhaps, itself: [H,1,D], or logits [1,V].

    Keys carry their positions, so a row may be moved to another place.
    """
    inputs = {}
    for name, array in diverged.feed.inputs.items():
        inputs[name] = array[slot : slot + 1].copy()
        if name.startswith("past_"):
            inputs[name][:, :, : len(rows)] = array[slot : slot + 1][:, :, list(rows)]
    positions = diverged.feed.inputs["row_position_ids"][slot]
    inputs["row_position_ids"][0, : len(rows)] = positions[list(rows)]
    inputs["row_position_ids"][0, len(rows)] = inputs["position_ids"][0, 0]
    inputs["write_index"] = np.array([len(rows)])
    inputs["kv_length"] = np.array([len(rows) + sees_itself])
    output = trained.run(inputs)[diverged.output][0]
    return output if diverged.output == LOGITS else output[:, len(rows) : len(rows) + 1]


def _between(diverged: Diverged) -> str:
    """Which part of the model lies between what agrees and what does not."""
    if diverged.output == LOGITS:
        return "All caches agree: the last layer's attention or MLP, the final norm or the LM head."
    layer = layer_of(diverged.output)
    key, value = diverged.failed(f"key.{layer}"), diverged.failed(f"value.{layer}")
    if key and value:
        before = "the embedding or the first norm" if layer == 0 else f"layer {layer - 1}'s attention or MLP"
        return f"Its key and value are both off, layers below it are not: {before}, or layer {layer}'s input norm."
    part = "key projection, its norm or the rotation" if key else "value projection"
    return f"Only the {'keys' if key else 'values'} are off: layer {layer}'s {part}."
