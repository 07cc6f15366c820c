"""Measure how many tokens a second an engine generates for one request and for several at once.

    python scripts/measure_throughput.py BUNDLE [--precision P] [--prompt-tokens 128 --prompt-tokens 512]
                                         [--active 1 --active 8] [--new-tokens 64] [--repeats 5]

Whole requests through `AsyncC2CEngine`, fused, with choosing tokens, text and listeners: tokens are counted from the
moment at which the last of the requests has its first token to the moment at which the first of them has its last, so
that all of them decode in every step that counts. Numbers of requests are measured by turns. Out: a table of medians
with the ratio to one request, and one line of JSON.
"""

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from c2c_export.errors import C2CError
from runtime import AsyncC2CEngine, Chunk, Request, SchedulerOptions


@dataclass(frozen=True)
class Result:
    """Medians for one number of requests after prompts of one length."""

    prompt_tokens: int
    active: int
    tokens_per_second: float
    times_one: float
    """Tokens a second against those of one request."""


@dataclass
class Listener:
    """Notes when each token came."""

    times: list[float] = field(default_factory=list)
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Chunk | Exception) -> None:
        if isinstance(event, Exception):
            self.error = event
        else:
            self.times += [time.perf_counter()] * len(event.token_ids)
        if self.error is not None or (isinstance(event, Chunk) and event.generation is not None):
            self.ended.set()


def tokens_per_second(engine: AsyncC2CEngine, prompts: Sequence[list[int]], new_tokens: int) -> float:
    """Of all prompts together, while all of them generate. Raises what a request ends with."""
    listeners = [Listener() for _ in prompts]
    for prompt, listener in zip(prompts, listeners, strict=True):
        engine.submit(Request(prompt=prompt, max_new_tokens=new_tokens, ignore_eos=True), listener)
    for listener in listeners:
        listener.ended.wait()
        if listener.error is not None:
            raise listener.error
    start, stop = max(one.times[0] for one in listeners), min(one.times[-1] for one in listeners)
    counted = sum(start < moment <= stop for one in listeners for moment in one.times)
    if not counted:
        raise C2CError("the first answer ended before the last one began; ask for more --new-tokens")
    return counted / (stop - start)


def measure(engine: AsyncC2CEngine, arguments: argparse.Namespace) -> list[Result]:
    """All lengths and numbers of requests, by turns."""
    # Each prompt is its own, so that nothing is reused.
    fresh = itertools.count()
    vocabulary = engine.bundle.manifest.receiver.vocab_size - 1

    def prompt(length: int) -> list[int]:
        number = next(fresh)
        return [1 + (number * 7919 + index * index) % vocabulary for index in range(length)]

    results = []
    for length in arguments.prompt_tokens:
        found: dict[int, list[float]] = {active: [] for active in arguments.active}
        for _ in range(arguments.repeats + 1):
            for active, rates in found.items():
                prompts = [prompt(length) for _ in range(active)]
                # The first ones generate while the last prompts are read.
                new_tokens = arguments.new_tokens + length // 8 * (active > 1)
                rates.append(tokens_per_second(engine, prompts, new_tokens))
        medians = {active: statistics.median(rates[1:]) for active, rates in found.items()}
        for active, rate in medians.items():
            results.append(Result(length, active, rate, rate / medians[1]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="ort-cpu")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--prompt-tokens", type=int, action="append", help="Repeatable. Default: 128 and 512.")
    parser.add_argument("--active", type=int, action="append", help="Requests at once; repeatable. Default: 1 and 8.")
    parser.add_argument("--new-tokens", type=int, default=64, help="Tokens that each request generates, at least.")
    parser.add_argument("--repeats", type=int, default=5, help="Runs that medians are taken of, after one more.")
    arguments = parser.parse_args()
    arguments.prompt_tokens = arguments.prompt_tokens or [128, 512]
    for name in ("prompt_tokens", "active", "new_tokens", "repeats"):
        value = getattr(arguments, name)
        if any(count < 1 for count in (value if isinstance(value, list) else [value or 1])) or value == 0:
            parser.error(f"--{name.replace('_', '-')}: expected integers of at least 1")
    arguments.active = sorted({1, *(arguments.active or [8])})
    engine = AsyncC2CEngine.from_bundle(
        arguments.bundle,
        arguments.engine,
        arguments.precision,
        num_slots=max(arguments.active),
        allow_unchecked=True,
        options=SchedulerOptions(prefix_cache_bytes=0),
    )
    try:
        results = measure(engine, arguments)
    finally:
        engine.close_and_wait(drain_seconds=0)
    table = Table("prompt tokens", "requests", "tokens/s", "times one")
    for result in results:
        rate, ratio = f"{result.tokens_per_second:.0f}", f"{result.times_one:.2f}"
        table.add_row(str(result.prompt_tokens), str(result.active), rate, ratio)
    Console(width=80).print(table)
    print(json.dumps({"results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    try:
        main()
    except C2CError as error:
        sys.exit(f"error: {error}")
