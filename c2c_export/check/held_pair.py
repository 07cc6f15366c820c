"""The whole pair in torch holding an engine's own weights: what the engine must give, but for how it computes.

In: a check's context. Out: `TrainedAnswers` with the dequantised weights of the engine's graphs, built when first asked
for. Where weights are rounded to integers, this tells a fault from what rounding costs. A graph that the engine lacks
keeps the trained weights; the level `weights` tells that it is missing.

Not covered: the other precisions, whose rounding is small enough for the trained models alone to tell.
"""

from typing import TYPE_CHECKING

from c2c_export.check.held_weights import decoder_holding, fuser_holding
from c2c_export.check.trained.answer import TrainedAnswers

if TYPE_CHECKING:
    from c2c_export.check.level import CheckContext

OWN_WEIGHTS = ", own weights"
"""What the name of a measurement ends in that compares with the pair of this module."""


class HeldPair:
    """The pair of one engine. In float32 it takes the memory of all its models again, until it is released."""

    def __init__(self) -> None:
        self._answers: TrainedAnswers | None = None

    def answers(self, context: "CheckContext") -> TrainedAnswers:
        """What the pair answers; raises `C2CError` where a graph cannot be read."""
        if self._answers is None:
            self._answers = _answers_holding(context)
        return self._answers

    def release(self) -> None:
        """Free the weights and the answers; asking again builds them anew."""
        self._answers = None


def is_compared_with_own_weights(precision: str) -> bool:
    """Whether the engine's weights are rounded so much that the pair holding them is compared too."""
    return precision in ("int8", "int4")


def _answers_holding(context: "CheckContext") -> TrainedAnswers:
    trained, model = context.trained, context.engine.model
    graphs = context.record.graphs
    sharers = [
        decoder_holding(model(f"sharer{number}"), sharer).trained if f"sharer{number}" in graphs else sharer
        for number, sharer in enumerate(trained.sharers)
    ]
    fusers = [
        fuser_holding(model(f"fuser{number}"), fuser).trained if f"fuser{number}" in graphs else fuser
        for number, fuser in enumerate(trained.fusers)
    ]
    return TrainedAnswers(decoder_holding(model("receiver"), trained.receiver).trained, sharers, fusers)
