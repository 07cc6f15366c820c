"""Decode steps that serve several requests in one run of the engine.

The requests are prefilled one after another, each into a slot of its own; then every step computes one token for each
of the first n slots. A repeat starts again after the prompts, over the same rows.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import median

import numpy as np

from c2c_export.bench.measure import Sizes
from c2c_export.bench.memory import PeakMemory
from c2c_export.bench.prompts import make_prompt
from c2c_export.bench.report import BatchRecord
from runtime import C2CPipeline, Session


def measure_batches(
    pipeline: C2CPipeline,
    num_tokens: int,
    batches: Sequence[int],
    new_tokens: int,
    repeats: int,
    random: np.random.Generator,
    sizes: Sizes,
) -> Iterator[BatchRecord]:
    """Measure steps of each number of requests in `batches`, all with prompts of `num_tokens` tokens.

    Medians over the steps of `repeats` runs after one that is not counted. The pipeline must have slots for the
    largest number, all of them free.
    """
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(pipeline.prefill(make_prompt(pipeline, num_tokens, random).prompt))
            for _ in range(max(batches))
        ]
        sessions.sort(key=lambda session: session.slot)
        assert [session.slot for session in sessions] == list(range(len(sessions)))
        for batch in sorted(set(batches)):
            memory = PeakMemory()
            run_steps(pipeline, sessions[:batch], new_tokens - 1)
            seconds = [value for _ in range(repeats) for value in run_steps(pipeline, sessions[:batch], new_tokens - 1)]
            milliseconds = 1000 * median(seconds)
            yield BatchRecord(
                asked_tokens=num_tokens,
                batch=batch,
                ms_per_step=milliseconds,
                tokens_per_second=1000 * batch / milliseconds,
                memory=memory.record(sizes.weight_bytes, len(sessions) * sizes.cache_bytes_per_slot),
            )


def run_steps(pipeline: C2CPipeline, sessions: Sequence[Session], num_steps: int) -> list[float]:
    """Decode `num_steps` tokens greedily for all sessions, which hold slots 0 to n-1; seconds of each step.

    The sessions themselves are not told of the tokens: their rows lie behind those that the sessions know.
    """
    tokens = np.array([session.logits.argmax() for session in sessions], dtype=np.int64)
    positions = np.array([session.plan.num_positions for session in sessions], dtype=np.int64)
    rows = np.array([len(session.position_ids) for session in sessions], dtype=np.int64)
    seconds = []
    for step in range(num_steps):
        started = time.perf_counter()
        pipeline.receiver.run_step(tokens, positions + step, rows + step)
        tokens = pipeline.receiver.step_logits(len(sessions)).argmax(axis=-1)
        seconds.append(time.perf_counter() - started)
    return seconds
