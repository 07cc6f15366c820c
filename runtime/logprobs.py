"""How likely a chosen token was, and which were likeliest: log-probabilities of the logits as the model gave them."""

import numpy as np
from numpy.typing import NDArray

from runtime.generation import TokenLogprob


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of every token, natural logarithms [V], by logits [V], finite but for -inf."""
    scores = logits.astype(np.float64)  # a sum of many small terms, so not in float32
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    return scores


def token_logprob(logits: NDArray[np.float32], token_id: int, num_alternatives: int) -> TokenLogprob:
    """The log-probability of `token_id` by logits [V], finite but for -inf, and the likeliest tokens with theirs.

    Of equally likely tokens those with smaller ids come first.
    """
    scores = log_probabilities(logits)
    num_alternatives = min(num_alternatives, scores.size)
    alternatives: list[tuple[int, float]] = []
    if num_alternatives:
        lowest = np.partition(scores, -num_alternatives)[-num_alternatives]
        candidates = np.flatnonzero(scores >= lowest)
        likeliest = candidates[np.argsort(-scores[candidates], kind="stable")][:num_alternatives]
        alternatives = [(int(index), float(scores[index])) for index in likeliest]
    return TokenLogprob(token_id, float(scores[token_id]), tuple(alternatives))
