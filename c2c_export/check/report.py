"""The whole result of a check as records: what `--json` writes, and what the HTML report and the terminal show.

The manifest keeps the `CheckRecord` of each engine only; everything else here is for readers.
"""

from c2c_export.check_record import CheckRecord
from c2c_export.record import Record


class CacheError(Record):
    """How far one cache of one receiver layer is off after the prompt, over all calibration prompts, real rows only."""

    max_error: float
    """Largest absolute error."""
    mean_error: float
    relative_error: float
    """Root mean square of the error by that of the trained model's cache."""
    head_errors: tuple[float, ...]
    """Largest absolute error by key/value head."""


class LayerCaches(Record):
    """A receiver layer's errors as the decoder reads it: fused where it was."""

    layer: int
    key: CacheError
    value: CacheError


class ProjectorDetails(Record):
    """A projector: its gates, and how strongly it fuses: the mean weight over heads and fused tokens."""

    sharer: int
    receiver_layer: int
    sharer_layer: int
    projector: int
    key_gate_logit: float
    value_gate_logit: float
    key_gate_open: bool
    value_gate_open: bool
    key_weight: float
    """Mean of the sigmoid, 0 to 1, over the calibration prompts."""
    value_weight: float


class TokenLogit(Record):
    """A candidate for the first new token."""

    token_id: int
    text: str
    logit: float


class PromptDetails(Record):
    """One calibration prompt on both sides."""

    prompt: str
    """Its text, shortened; token ids where it was given as such."""
    num_tokens: int
    """Receiver tokens of the prompt."""
    max_error: float
    """Of the logits of the last prompt token."""
    mean_error: float
    kl_divergence: float
    """Of the engine's distribution from the trained model's, in nats."""
    top1_equal: bool
    top5_shared: int
    """How many of the trained model's five likeliest tokens are among the engine's."""
    trained_top5: tuple[TokenLogit, ...]
    engine_top5: tuple[TokenLogit, ...]
    trained_text: str
    """What the trained model generates greedily."""
    engine_text: str
    common_prefix: int
    """Greedy tokens that are equal from the first on."""
    num_generated: int


class QuestionScore(Record):
    """Share of right answers of one way to answer."""

    way: str
    """`receiver`, `sharer <k>` or `C2C`."""
    trained: float
    engine: float | None
    """None for a sharer alone, which a bundle has no LM head of: it is asked in torch only."""
    same_answers: float | None
    """Share of questions on which both sides choose the same answer."""
    num_questions: int


class EngineReport(Record):
    """One engine's check with all that a reader may want to see."""

    engine: str
    """Its name in the manifest, such as `ort-cpu-int4`."""
    target: str
    precision: str
    check: CheckRecord
    not_kept: str | None = None
    """Why the manifest does not keep the result; None if it does."""
    caches: tuple[LayerCaches, ...] = ()
    projectors: tuple[ProjectorDetails, ...] = ()
    prompts: tuple[PromptDetails, ...] = ()
    questions: tuple[QuestionScore, ...] = ()


class CheckReport(Record):
    """The result of one `c2c-export check`."""

    bundle: str
    receiver: str
    """The model's source and architecture."""
    sharers: tuple[str, ...]
    fusers: tuple[str, ...]
    engines: tuple[EngineReport, ...]
    problems: tuple[str, ...] = ()
    """Why an engine was not checked, or its result not kept, described or written."""

    @property
    def passed(self) -> bool:
        """Whether every engine that was asked for was checked and passed."""
        return not self.problems and all(engine.check.passed for engine in self.engines)
