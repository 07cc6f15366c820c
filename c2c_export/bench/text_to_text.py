"""C2C beside text-to-text on the same engines: the sharer writes a hint, the receiver reads question and hint.

Text-to-text is the baseline of arXiv 2510.03215: the sharer is asked for a hint (at most 64 tokens here, greedy), and
the receiver answers the question with the hint before it. The sharer of a pair's bundle has no LM head, so the
baseline runs a bundle of one model, the sharer's own (`c2c-export pair --receiver SHARER`).
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from c2c_export.bench.report import AnswerTimes, QuestionRecord, TextToTextRecord
from c2c_export.bundle import Bundle, Manifest
from c2c_export.errors import UsageError
from c2c_export.tokenizer import BundledTokenizer
from engines.select import EngineChoice
from runtime import C2CPipeline, Message
from runtime.prompt import Plan, PromptPlanner

QUESTIONS = (
    "Which country is the city of Porto in?",
    "What is a person who makes barrels called?",
    "Which continent is the country of Laos in?",
)
MAX_HINT_TOKENS = 64
_HINT_PROMPT = "Write one or two sentences of facts that help to answer this question: {question}"
_ANSWER_PROMPT = "{question}\nHint: {hint}"


def check_sharer_bundle(path: Path, pair: Manifest) -> None:
    """Raise `UsageError` unless the bundle at `path` is one model's, that of the pair's first sharer, and large enough.

    That reads its tokenizer, whose memory is free again afterwards.
    """
    if not pair.sharers:
        raise UsageError("--text-to-text: the bundle has no sharer to compare with; expected a pair's bundle")
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    ours, theirs = manifest.receiver, pair.sharers[0].model
    if ours.sources != theirs.sources:
        raise UsageError(
            f"--text-to-text {path}: its receiver is {ours.source}, expected the files of the pair's sharer, "
            f"{theirs.source}; write it with: c2c-export pair --receiver {theirs.source} -o OUT"
        )
    if manifest.sharers:
        raise UsageError(f"--text-to-text {path}: a pair's bundle, expected that of its receiver alone")
    tokenizer = BundledTokenizer.load(bundle.tokenizer_folder())
    planner = PromptPlanner(
        tokenizer, [], [], manifest.aligned, receiver_vocab=manifest.receiver.vocab_size, sharer_vocabs=[]
    )
    for question in QUESTIONS:
        plan = planner.plan_messages([Message("user", _HINT_PROMPT.format(question=question))], sharers=())
        _check_room(f"--text-to-text {path}", manifest.max_length, plan, MAX_HINT_TOKENS)


def check_pair_capacity(pipeline: C2CPipeline, new_tokens: int) -> None:
    """Raise `UsageError` unless the pair's bundle has room for each question, its hint and the answer.

    A hint counts as many tokens of the receiver's as it has of the sharer's.
    """
    manifest = pipeline.bundle.manifest
    sharers = tuple(range(len(manifest.sharers)))
    for question in QUESTIONS:
        asked, hinted = (
            pipeline.make_plan([Message("user", content)], [], numbers)
            for content, numbers in ((question, sharers), (_ANSWER_PROMPT.format(question=question, hint=""), ()))
        )
        _check_room("--text-to-text", manifest.max_length, asked, new_tokens)
        _check_room("--text-to-text", manifest.max_length, hinted, MAX_HINT_TOKENS + new_tokens)


def _check_room(what: str, capacity: int, plan: Plan, new_tokens: int) -> None:
    # The last token's row is never written.
    needed = len(plan.receiver.ids) + new_tokens - 1
    if needed > capacity:
        raise UsageError(
            f"{what}: prompt, hint and answer take {needed} tokens, the bundle's capacity is {capacity}; export it "
            "with a larger --max-length"
        )


def check_sharer_engine(path: Path, choice: EngineChoice) -> None:
    """Raise `UsageError` unless the bundle at `path` has the engine that the pair runs on."""
    engines = Bundle.open(path).manifest.engines.values()
    if not any((record.target, record.precision) == (choice.target, choice.precision) for record in engines):
        raise UsageError(
            f"--text-to-text {path}: has no engine {choice.target} in {choice.precision}, on which the pair runs; "
            f"build it with: c2c-export build {path} --engine {choice.target} --precision {choice.precision}"
        )


def measure_text_to_text(pipeline: C2CPipeline, sharer: C2CPipeline, new_tokens: int, repeats: int) -> TextToTextRecord:
    """Answer `QUESTIONS` both ways by turns; medians over `repeats` runs after one that is not counted."""
    records = []
    for question in QUESTIONS:
        c2c: list[AnswerTimes] = []
        text: list[AnswerTimes] = []
        for _ in range(repeats + 1):
            c2c.append(_answer(pipeline, question, new_tokens))
            text.append(_answer_with_hint(pipeline, sharer, question, new_tokens))
        records.append(QuestionRecord(question=question, c2c=_median_of(c2c[1:]), text_to_text=_median_of(text[1:])))
    return TextToTextRecord(
        sharer_bundle=str(sharer.bundle.root),
        max_hint_tokens=MAX_HINT_TOKENS,
        questions=tuple(records),
        first_token_ratio=_ratio(records, lambda times: times.first_token),
        answer_ratio=_ratio(records, lambda times: times.answer),
    )


def _answer(pipeline: C2CPipeline, question: str, new_tokens: int) -> AnswerTimes:
    started = time.perf_counter()
    generation = pipeline.generate(question, max_new_tokens=new_tokens)
    return AnswerTimes(
        first_token=generation.timings.ttft,
        answer=time.perf_counter() - started,
        hint_tokens=0,
        answer_tokens=len(generation.token_ids),
    )


def _answer_with_hint(pipeline: C2CPipeline, sharer: C2CPipeline, question: str, new_tokens: int) -> AnswerTimes:
    started = time.perf_counter()
    hint = sharer.generate(_HINT_PROMPT.format(question=question), max_new_tokens=MAX_HINT_TOKENS)
    hint_seconds = time.perf_counter() - started
    prompt = _ANSWER_PROMPT.format(question=question, hint=hint.text.strip())
    generation = pipeline.generate(prompt, fuse=False, max_new_tokens=new_tokens)
    return AnswerTimes(
        first_token=hint_seconds + generation.timings.ttft,
        answer=time.perf_counter() - started,
        hint_tokens=len(hint.token_ids),
        answer_tokens=len(generation.token_ids),
    )


def _median_of(runs: list[AnswerTimes]) -> AnswerTimes:
    # Greedy, so every run writes the same tokens.
    return AnswerTimes(
        first_token=median(run.first_token for run in runs),
        answer=median(run.answer for run in runs),
        hint_tokens=runs[0].hint_tokens,
        answer_tokens=runs[0].answer_tokens,
    )


def _ratio(records: list[QuestionRecord], seconds: Callable[[AnswerTimes], float]) -> float:
    return median(seconds(record.text_to_text) / seconds(record.c2c) for record in records)
