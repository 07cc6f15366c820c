"""From the logits of one step to the next token id.

In: float32 logits `[V]` of one request, the token ids so far (prompt and generated), and `SamplingParams`. Out: one
token id. The logits are processed as transformers' `generate` does it (repetition penalty; then, when sampling,
temperature, top-k, top-p, min-p, in this order, in float32), so the same parameters give the same distribution. Where
top-p cuts through equal logits, as many are kept as there; which of them, torch leaves open. The random numbers are
numpy's, so a seed does not repeat what torch draws from it. Not covered: beam search, the other processors of
transformers, batches (one `Sampler` per request).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from c2c_export.errors import C2CError, UsageError

# a divisor beyond these would overflow float32 with ordinary logits, and the softmax would be NaN
_MIN_DIVISOR = 1e-30
_MAX_DIVISOR = 1e30


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Raises `UsageError`, naming the field, for a wrong type or a value out of range.

    Without any field set the choice is greedy. `temperature` 0 is greedy whatever else is set; a temperature above 0
    samples; None means 1.0 if `top_k` (other than 0), `top_p` or `min_p` is given, else greedy.
    """

    temperature: float | None = None
    """Divides the logits: 0 (greedy) or 1e-30 to 1e30."""
    top_k: int | None = None
    """Keep the k largest logits, and those equal to the k-th. 0 or None keeps all."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens whose probabilities add up to this, 0 to 1; at least one token."""
    min_p: float | None = None
    """Keep the tokens that are at least this times as probable as the most probable one, 0 to 1."""
    repetition_penalty: float = 1.0
    """Divides (negative: multiplies) the logits of tokens seen before, greedy or not: 1e-30 to 1e30, 1.0 is off."""
    seed: int | None = None
    """Seed of the draws, 0 or more; None draws fresh entropy."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "SamplingParams":
        """The parameters with these fields. Raises `UsageError` for one that there is not."""
        unknown = sorted(options.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"unknown option {unknown[0]}; the sampling options are {known}")
        return cls(**options)

    def __post_init__(self) -> None:
        if self.temperature is not None:
            lowest = 0.0 if self.temperature == 0 else _MIN_DIVISOR
            _check_real("temperature", self.temperature, lowest, _MAX_DIVISOR, "0 (greedy) or 1e-30 to 1e30")
        for field in ("top_p", "min_p"):
            if (value := getattr(self, field)) is not None:
                _check_real(field, value, 0.0, 1.0, "a number, 0 to 1")
        penalty = self.repetition_penalty
        _check_real("repetition_penalty", penalty, _MIN_DIVISOR, _MAX_DIVISOR, "1e-30 to 1e30 (1.0 is off)")
        for field in ("top_k", "seed"):
            if (value := getattr(self, field)) is not None:
                _check_count(field, value)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken rather than one drawn."""
        if self.temperature is None:
            return not self.top_k and self.top_p is None and self.min_p is None
        return self.temperature == 0


def process_logits(
    logits: NDArray[np.float32], token_ids: Sequence[int] | NDArray[np.integer], params: SamplingParams
) -> NDArray[np.float32]:
    """Penalise, scale and filter logits `[V]`; a filtered token gets -inf. Returns a new float32 array `[V]`.

    `token_ids` (prompt and generated) may be empty; ids of V or more are ignored, as the model cannot produce them.
    """
    scores = np.array(logits, dtype=np.float32)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(token_ids, dtype=np.int64))
        if seen.size and seen[0] < 0:
            raise UsageError(f"token_ids: {seen[0]} is negative; expected token ids of the receiver")
        seen = seen[seen < scores.size]
        penalty = np.float32(params.repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if params.greedy:
        return scores

    if params.temperature is not None:
        scores /= np.float32(params.temperature)
    if params.top_k and params.top_k < scores.size:
        kth_largest = np.partition(scores, scores.size - params.top_k)[scores.size - params.top_k]
        scores[scores < kth_largest] = -np.inf
    if params.top_p is not None and params.top_p < 1.0:
        _keep_top_p(scores, params.top_p)
    if params.min_p is not None:
        probabilities = _softmax(scores)
        scores[probabilities < np.float32(params.min_p) * probabilities.max()] = -np.inf
    return scores


class Sampler:
    """Chooses the tokens of one request; owns the random generator, so two samplers with one seed draw alike."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = np.random.default_rng(params.seed)

    def sample(self, logits: NDArray[np.float32], token_ids: Sequence[int] | NDArray[np.integer]) -> int:
        """Return the next token id for logits `[V]` after `token_ids` (prompt and generated).

        Greedy takes the first of equal maxima. Raises `C2CError` if the logits hold NaN or +inf or are all -inf.
        """
        scores = process_logits(logits, token_ids, self.params)
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            raise C2CError(
                f"logits: {scores[best]} found for token {best} where a finite number was expected; the engine "
                "overflowed: try another precision (and a higher temperature, if it is tiny)"
            )
        if self.params.greedy:
            return best
        kept = np.flatnonzero(scores != -np.inf)
        cumulative = np.exp((scores[kept] - scores[best]).astype(np.float64)).cumsum()
        # random() < 1, so the product stays below the last sum, and side="right" skips tokens of probability 0
        drawn = cumulative.searchsorted(self._generator.random() * cumulative[-1], side="right")
        return int(kept[drawn])


def _keep_top_p(scores: NDArray[np.float32], top_p: float) -> None:
    """Set the least probable tokens, together at most 1 - top_p probable, to -inf in place; at least one stays."""
    ascending = np.sort(scores)
    # torch sums in double and rounds every partial sum; so do we, for the comparison below to fall the same way
    cumulative = _softmax(ascending).cumsum(dtype=np.float64).astype(np.float32)
    num_removed = min(int(np.count_nonzero(cumulative <= np.float32(1 - top_p))), scores.size - 1)
    lowest_kept = ascending[num_removed]
    # torch's sort is unstable, so transformers leaves open which of several equal tokens go; the smallest ids do here
    num_removed_of_equals = num_removed - int(np.searchsorted(ascending, lowest_kept, side="left"))
    removed_equals = np.flatnonzero(scores == lowest_kept)[:num_removed_of_equals]
    scores[scores < lowest_kept] = -np.inf
    scores[removed_equals] = -np.inf


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    exponentials = np.exp(scores - scores.max())
    probabilities: NDArray[np.float32] = exponentials / exponentials.sum()
    return probabilities


def _check_real(field: str, value: object, low: float, high: float, expected: str) -> None:
    # a NaN fails both comparisons
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not low <= value <= high
    ):
        raise _out_of_range(field, value, expected)


def _check_count(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise _out_of_range(field, value, "an integer, 0 or more")


def _out_of_range(field: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{field}: {value!r} is not allowed; expected {expected}")
