"""What a benchmark found, as records that become JSON. Times are medians unless said otherwise; sizes are bytes."""

from typing import Literal

from c2c_export.record import Record


class MachineRecord(Record):
    """The machine and the libraries that were measured."""

    processor: str
    cores: int
    """Logical processors that this process may use."""
    threads: int
    """Threads of each engine and of the reference."""
    memory_bytes: int | None
    others_cores: float | None
    """Processors that other processes kept busy on average meanwhile; what they take makes all times longer."""
    system: str
    versions: dict[str, str]


class BundleSummary(Record):
    """What was measured."""

    path: str
    engine: str
    precision: str
    reason: str
    """Why this engine ran."""
    receiver: str
    sharers: tuple[str, ...]
    aligned: bool
    max_length: int
    weight_bytes: int
    """Size of the engine's files, weights included."""
    lookup_bytes: int | None = None
    """Of them, tables that are only looked up, such as an embedding that is no LM head too: few of their rows are read,
    and only those are in memory. None where the system or the engine does not tell."""
    cache_bytes_per_slot: int
    """What the caches of one request take at full capacity, of all models."""
    load_seconds: float
    load_peak_bytes: int | None
    """Peak memory of the process while engines were loaded."""


class Settings(Record):
    """How it was measured."""

    prompt_tokens: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    repeats: int
    seed: int


class MemoryRecord(Record):
    """Peak memory of this process during a measurement, beside what it must hold."""

    peak_bytes: int
    """Largest resident set (VmHWM)."""
    anonymous_bytes: int | None
    """Of the resident set at its end: memory of the process itself (RssAnon)."""
    file_bytes: int | None
    """Likewise: pages of mapped files (RssFile), such as weights that are read in place."""
    weight_bytes: int
    """Size of the engine's files, tables that are only looked up included; `BundleSummary.lookup_bytes` has those."""
    cache_bytes: int
    """Of the rows in use, of all requests and models."""
    excess: float
    """(peak - weights - caches) / (weights + caches): what it takes beyond both, interpreter and libraries included."""
    measured_by: str


class PhaseTimes(Record):
    """Time to first token in seconds and its parts, and decoding."""

    ttft: float
    ttft_range: tuple[float, float]
    """The shortest and the longest of the repeats."""
    sharer_prefill: float
    receiver_prefill: float
    fuse: float
    rest: float
    """`ttft` less the three phases: planning and choosing the token. Negative where phases overlap by more."""
    decode_ms_per_token: float
    """Median over all steps of all repeats."""
    decode_ms_quartiles: tuple[float, float]
    """A quarter of the steps took less than the first, a quarter more than the second."""
    tokens_per_second: float
    """1000 / `decode_ms_per_token`."""


class PromptRecord(Record):
    """One prompt length."""

    asked_tokens: int
    receiver_tokens: int
    """Tokens that the receiver read; fewer than asked for where words do not add up to them."""
    sharer_tokens: dict[int, int]
    """Tokens that each sharer computed, by its number; sharers whose gates are all closed compute none."""
    fused_tokens: int
    """Receiver tokens that were fused, counted once."""
    c2c: PhaseTimes
    receiver_alone: PhaseTimes
    memory: MemoryRecord | None
    """None where the system does not tell."""


class BatchRecord(Record):
    """Decode steps that serve several requests in one run; choosing a token of each is part of a step."""

    asked_tokens: int
    batch: int
    ms_per_step: float
    tokens_per_second: float
    """Of all requests together: 1000 * `batch` / `ms_per_step`."""
    memory: MemoryRecord | None


class AnswerTimes(Record):
    """Seconds to an answer, and what was written."""

    first_token: float
    answer: float
    """To the last token of the answer."""
    hint_tokens: int
    """Tokens that the sharer wrote; 0 for C2C."""
    answer_tokens: int


class QuestionRecord(Record):
    """One question, answered both ways; medians over the repeats."""

    question: str
    c2c: AnswerTimes
    text_to_text: AnswerTimes


class TextToTextRecord(Record):
    """C2C beside text-to-text: the sharer writes a hint, the receiver reads question and hint."""

    sharer_bundle: str
    max_hint_tokens: int
    questions: tuple[QuestionRecord, ...]
    first_token_ratio: float
    """Text-to-text over C2C, median over the questions."""
    answer_ratio: float


class GemmSpeed(Record):
    """The speed of one matrix product [m,k] x [k,n]."""

    m: int
    k: int
    n: int
    gflops: float


class SpeedShares(Record):
    """How near one prompt length's phases come to the machine's own speed; None for a phase that did not run."""

    asked_tokens: int
    sharer_prefill: float | None
    receiver_prefill: float
    fuse: float | None
    ttft: float
    """All needed products over time to first token."""
    decode: float
    """Bytes read per step over time, as a share of the read speed."""
    gflop: dict[str, float]
    """Needed work by phase, in units of 1e9 floating-point operations."""
    decode_bytes: int
    """What a step must read: weights of all products, and the cached rows before it (their mean over the steps)."""


class RooflineRecord(Record):
    """What the machine can do, measured in the same run, and how near each phase comes."""

    gemms: tuple[GemmSpeed, ...]
    gemm_gflops: float
    """The best of `gemms`."""
    numpy_gflops: float | None
    """numpy's best over the same shapes, for comparison; None where its threads cannot be set alike."""
    read_gb_per_second: float
    read_by: str
    shares: tuple[SpeedShares, ...]


class ReferenceTimes(Record):
    """The research code at one prompt length, and its times over ours."""

    asked_tokens: int
    ttft: float
    ttft_range: tuple[float, float]
    """The shortest and the longest of the repeats."""
    sharer_prefill: float
    receiver_prefill: float
    fuse: float
    """Time to first token less both prefills: the fusers, and the copies of caches around them."""
    decode_ms_per_token: float
    decode_ms_quartiles: tuple[float, float]
    ttft_ratio: float
    decode_ratio: float
    equal_tokens: int
    """How many of the first new tokens are those that the bundle gave for the same prompt."""
    new_tokens: int


class ReferenceRecord(Record):
    """The research code in a process of its own, torch in float32."""

    checkout: str
    versions: dict[str, str]
    prompts: tuple[ReferenceTimes, ...]
    peak_bytes: int | None
    """Of its process."""


class BenchReport(Record):
    """Everything; parts that were not asked for are None or empty."""

    report_version: Literal[1] = 1
    machine: MachineRecord
    bundle: BundleSummary
    settings: Settings
    prompts: tuple[PromptRecord, ...]
    batches: tuple[BatchRecord, ...]
    text_to_text: TextToTextRecord | None = None
    roofline: RooflineRecord | None = None
    reference: ReferenceRecord | None = None
    problems: tuple[str, ...] = ()
    """Why parts that were asked for are missing: what failed after measuring had begun."""
    interrupted: bool = False
    """Whether the user ended the measuring; what came after that is missing."""
