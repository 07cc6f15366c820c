"""How likely a model finds tokens that somebody else chose: log-probabilities, without generating anything.

In: the logits before the first token, the tokens, and a function that runs one token and gives the logits after it.
Out: a `Score`. A receiver's graph has the logits of one token a run, so n tokens take n - 1 runs: each but the last is
a decode step, and a choice of one token costs nothing beyond its prompt. Not covered: how text becomes tokens
(`PromptPlanner.continuation_ids`), and where the rows of the steps lie (`Session.score`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from c2c_export.errors import C2CError
from runtime.logprobs import log_probabilities


@dataclass(frozen=True)
class Score:
    """A continuation of n tokens, scored token by token."""

    token_ids: list[int]
    """The tokens that were scored, [n]."""
    log_probabilities: list[float]
    """Of each token after the prompt and the tokens before it, natural logarithm, [n]."""
    greedy: list[bool]
    """Whether each token is the likeliest one there, the first of equally likely ones, [n]."""

    @property
    def log_likelihood(self) -> float:
        """Of the whole continuation: the sum of the log-probabilities."""
        return float(sum(self.log_probabilities))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding generates exactly these tokens (if it does not stop)."""
        return all(self.greedy)


def score_tokens(
    logits: NDArray[np.float32], token_ids: Sequence[int], step: Callable[[int, int], NDArray[np.float32]]
) -> Score:
    """Score `token_ids` [n], of which the first is predicted by `logits` [V].

    `step(i, token_id)` runs token i and returns the logits [V] that predict token i + 1; it is called for all tokens
    but the last, in order. Raises `C2CError` if logits hold NaN or +inf or are all -inf.
    """
    scores, greedy = [], []
    for index, token_id in enumerate(token_ids):
        if index:
            logits = step(index - 1, token_ids[index - 1])
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise C2CError(
                f"logits: {logits[best]} found for token {best} where a finite number was expected; the engine "
                "overflowed: try another precision"
            )
        scores.append(float(log_probabilities(logits)[token_id]))
        greedy.append(token_id == best)
    return Score(list(token_ids), scores, greedy)
