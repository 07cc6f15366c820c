"""Measure one prompt: time to first token and its parts, and decode steps, with all sharers or the receiver alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from c2c_export.bench.memory import PeakMemory
from c2c_export.bench.prompts import BenchPrompt
from c2c_export.bench.report import PhaseTimes, PromptRecord
from runtime import C2CPipeline, Generation


@dataclass(frozen=True)
class Run:
    """One generation: its tokens and timings, and the seconds of every step after the first token."""

    generation: Generation
    step_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Sizes:
    """What the engine must hold, in bytes."""

    weight_bytes: int
    cache_bytes_per_slot: int


def measure_prompt(
    pipeline: C2CPipeline, prompt: BenchPrompt, new_tokens: int, repeats: int, sizes: Sizes
) -> tuple[PromptRecord, list[int]]:
    """Measure `prompt` with all sharers and without; medians over `repeats` runs after one that is not counted.

    Returns the record and the tokens that were generated with all sharers.
    """
    memory = PeakMemory()
    run_once(pipeline, prompt, new_tokens, fuse=True)
    fused = [run_once(pipeline, prompt, new_tokens, fuse=True) for _ in range(repeats)]
    peak = memory.record(sizes.weight_bytes, sizes.cache_bytes_per_slot)
    run_once(pipeline, prompt, new_tokens, fuse=False)
    alone = [run_once(pipeline, prompt, new_tokens, fuse=False) for _ in range(repeats)]
    plan = prompt.plan
    last_fused = max((section.stop for section in plan.sections if section.fused), default=0)
    record = PromptRecord(
        asked_tokens=prompt.asked_tokens,
        receiver_tokens=len(plan.receiver.ids),
        sharer_tokens=sum(int((tokens.position_ids < last_fused).sum()) for tokens in plan.sharers.values()),
        fused_tokens=sum(section.stop - section.start for section in plan.sections if section.fused),
        c2c=phase_times(fused),
        receiver_alone=phase_times(alone),
        memory=peak,
    )
    return record, fused[0].generation.token_ids


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
    milliseconds = 1000 * median(seconds for run in runs for seconds in run.step_seconds)
    return PhaseTimes(**phases, rest=rest, decode_ms_per_token=milliseconds, tokens_per_second=1000 / milliseconds)
