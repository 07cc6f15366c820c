"""Measure one prompt: time to first token and its parts, and decode steps, with all sharers or the receiver alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from c2c_export.bench.memory import PeakMemory, sharer_rows, used_cache_bytes
from c2c_export.bench.prompts import BenchPrompt
from c2c_export.bench.report import PhaseTimes, PromptRecord
from runtime import C2CPipeline, Generation
from runtime.prompt import Plan


@dataclass(frozen=True)
class Run:
    """One generation: its tokens and timings, and the seconds of every step after the first token."""

    generation: Generation
    step_seconds: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class MeasuredPrompt:
    """A prompt's plan, what was measured, and the tokens that were generated with all sharers."""

    plan: Plan
    record: PromptRecord
    token_ids: Sequence[int]


def measure_prompt(
    pipeline: C2CPipeline, prompt: BenchPrompt, new_tokens: int, repeats: int, weight_bytes: int
) -> MeasuredPrompt:
    """Measure `prompt` with all sharers and without, by turns; medians over `repeats` runs after one not counted."""
    memory = PeakMemory()
    fused: list[Run] = []
    alone: list[Run] = []
    for _ in range(repeats + 1):
        fused.append(run_once(pipeline, prompt, new_tokens, fuse=True))
        alone.append(run_once(pipeline, prompt, new_tokens, fuse=False))
    plan = prompt.plan
    record = PromptRecord(
        asked_tokens=prompt.asked_tokens,
        receiver_tokens=len(plan.receiver.ids),
        sharer_tokens=sharer_rows(plan, pipeline.prefiller.sharers),
        fused_tokens=sum(section.stop - section.start for section in plan.sections if section.fused),
        c2c=phase_times(fused[1:]),
        receiver_alone=phase_times(alone[1:]),
        memory=memory.record(weight_bytes, used_cache_bytes(pipeline, plan, new_tokens)),
    )
    return MeasuredPrompt(plan, record, fused[0].generation.token_ids)


def run_once(pipeline: C2CPipeline, prompt: BenchPrompt, new_tokens: int, *, fuse: bool) -> Run:
    """Generate `new_tokens` tokens greedily, end of sequence ignored, and time every step."""
    generation, seconds = None, []
    with pipeline.prefill(prompt.prompt, fuse=fuse) as session:
        chunks = session.stream(max_new_tokens=new_tokens, ignore_eos=True)
        for _ in range(new_tokens):
            started = time.perf_counter()
            next(chunks)
            seconds.append(time.perf_counter() - started)
        for chunk in chunks:
            generation = chunk.generation
    assert generation is not None
    return Run(generation, tuple(seconds[1:]))


def phase_times(runs: Sequence[Run]) -> PhaseTimes:
    """Medians over `runs` of each phase, and over all their steps."""
    timings = [run.generation.timings for run in runs]
    phases = {
        name: median(getattr(timing, name) for timing in timings)
        for name in ("ttft", "sharer_prefill", "receiver_prefill", "fuse")
    }
    rest = median(t.ttft - t.sharer_prefill - t.receiver_prefill - t.fuse for t in timings)
    steps = [1000 * seconds for run in runs for seconds in run.step_seconds]
    milliseconds = median(steps)
    return PhaseTimes(
        **phases,
        ttft_range=(min(timing.ttft for timing in timings), max(timing.ttft for timing in timings)),
        rest=rest,
        decode_ms_per_token=milliseconds,
        decode_ms_quartiles=quartiles(steps),
        tokens_per_second=1000 / milliseconds,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile of `values`."""
    first, third = np.quantile(values, [0.25, 0.75])
    return float(first), float(third)
