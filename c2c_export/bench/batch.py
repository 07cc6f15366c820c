"""Decode steps that serve several requests in one run of the engine.

The requests are prefilled one after another, each into a slot of its own; then every step computes one token for each
slot, and chooses the best. A repeat starts again after the prompts, over the same rows. Every number of requests gets a
pipeline of its own, so that its memory is not that of a larger one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median

import numpy as np

from c2c_export.bench.memory import PeakMemory, available_bytes, used_cache_bytes
from c2c_export.bench.prompts import make_prompt
from c2c_export.bench.report import BatchRecord
from c2c_export.errors import UsageError
from runtime import C2CPipeline, Session


def check_batches(pipeline: C2CPipeline, batches: Sequence[int], num_rows: int) -> None:
    """Raise `UsageError` where the caches and logits of so many requests of `num_rows` rows do not fit into memory."""
    available = available_bytes()
    if not batches or available is None or pipeline.receiver.device.memory != "cpu":
        return
    # Logits are twice in memory: the engine's own, and the copy that a step is chosen from.
    logits = 2 * np.dtype(np.float32).itemsize * pipeline.bundle.manifest.receiver.vocab_size
    request = num_rows * sum(decoder.pool.row_bytes for decoder in pipeline.decoders) + logits
    needed, most = max(batches) * request, available // request
    if needed > available:
        raise UsageError(
            f"--batch {max(batches)}: the caches and logits of so many requests of {num_rows} tokens take "
            f"{needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are free; "
            + (f"ask for at most {most}" if most else "ask for shorter prompts, or free memory")
        )


def measure_batches(
    open_pipeline: Callable[[int], C2CPipeline],
    batch: int,
    lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
    random: np.random.Generator,
    weight_bytes: int,
) -> Iterator[BatchRecord]:
    """Measure steps of `batch` requests after prompts of each of `lengths` tokens, which ascend.

    Medians over the steps of `repeats` runs after one that is not counted. `open_pipeline` is given the slots.
    """
    pipeline = open_pipeline(batch)
    for num_tokens in lengths:
        memory = PeakMemory()
        prompts = [make_prompt(pipeline, num_tokens, random) for _ in range(batch)]
        with ExitStack() as stack:
            sessions = [stack.enter_context(pipeline.prefill(prompt.prompt)) for prompt in prompts]
            sessions.sort(key=lambda session: session.slot)
            assert [session.slot for session in sessions] == list(range(batch))
            run_steps(pipeline, sessions, new_tokens - 1)
            seconds = [value for _ in range(repeats) for value in run_steps(pipeline, sessions, new_tokens - 1)]
        milliseconds = 1000 * median(seconds)
        yield BatchRecord(
            asked_tokens=num_tokens,
            batch=batch,
            ms_per_step=milliseconds,
            tokens_per_second=1000 * batch / milliseconds,
            memory=memory.record(
                weight_bytes, sum(used_cache_bytes(pipeline, prompt.plan, new_tokens) for prompt in prompts)
            ),
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
