"""The engine from asyncio: streams, cancellation, closing, and no request without an end."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from decode_gate import DecodeGate

from c2c_export.errors import C2CError, UsageError
from runtime import (
    AbortedError,
    AsyncC2CEngine,
    C2CPipeline,
    ClosedError,
    DeadlineError,
    QueueFullError,
    Request,
    SamplingParams,
    SchedulerOptions,
)
from runtime.prompt import Plan

ROOT = Path(__file__).parents[2]
NAME = "qwen3_from_llama_aligned"
pytestmark = pytest.mark.xdist_group(NAME)
QUESTION = "What is the capital of France?"
ENDLESS = Request(prompt=QUESTION, ignore_eos=True)

BundleOf = Callable[[str], Path]
Scenario = Callable[[AsyncC2CEngine], Awaitable[None]]


@pytest.fixture
def run(recorded_bundle: BundleOf) -> Callable[..., AsyncC2CEngine]:
    """Run a scenario on an engine, close it, and see that its thread has ended."""

    def run_scenario(scenario: Scenario, **options: int) -> AsyncC2CEngine:
        async def body() -> AsyncC2CEngine:
            engine = AsyncC2CEngine.from_bundle(
                recorded_bundle(NAME),
                num_threads=1,
                num_slots=2,
                allow_unchecked=True,
                options=SchedulerOptions(**options),  # type: ignore[arg-type]
            )
            async with engine:
                await scenario(engine)
            return engine

        engine = asyncio.run(asyncio.wait_for(body(), 120))
        assert not engine._thread.is_alive()
        assert (engine.num_active, engine.num_waiting) == (0, 0)
        assert engine._scheduler.num_free_slots == 2
        return engine

    return run_scenario


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_answers_and_streams_are_the_pipelines(
    run: Callable[..., AsyncC2CEngine], recorded_pipeline: Callable[[str], C2CPipeline]
):
    pipe = recorded_pipeline(NAME)
    sampling = SamplingParams(temperature=0.9, top_k=20, seed=4)

    async def scenario(engine: AsyncC2CEngine) -> None:
        async def streamed() -> tuple[str, list[int]]:
            text, ids = "", []
            async for chunk in engine.stream(Request(prompt=QUESTION, max_new_tokens=12, sampling=sampling)):
                text, ids = text + chunk.text, ids + chunk.token_ids
            assert chunk.generation is not None
            assert (chunk.generation.text, chunk.generation.token_ids) == (text, ids)
            return text, ids

        whole, alone, stream = await asyncio.gather(
            engine.generate(Request(prompt=QUESTION, max_new_tokens=12)),
            engine.generate(Request(prompt=QUESTION, max_new_tokens=12, fuse=False)),
            streamed(),
        )
        assert whole.token_ids == pipe.generate(QUESTION, max_new_tokens=12).token_ids
        assert alone.token_ids == pipe.generate(QUESTION, max_new_tokens=12, fuse=False).token_ids
        expected = pipe.generate(QUESTION, max_new_tokens=12, temperature=0.9, top_k=20, seed=4)
        assert stream == (expected.text, expected.token_ids)

    run(scenario)


def test_timings_tell_waiting_from_the_time_to_the_first_token(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        gate = DecodeGate(engine)
        running = [asyncio.create_task(engine.generate(Request(prompt=QUESTION, max_new_tokens=2))) for _ in range(2)]
        await until(lambda: engine.num_active == 2)
        submitted = time.perf_counter()
        chunks = engine.stream(Request(prompt=QUESTION, max_new_tokens=4, ignore_eos=True))
        first = asyncio.create_task(anext(chunks))
        await until(lambda: engine.num_waiting == 1)
        await asyncio.to_thread(engine._planners.submit(lambda: None).result)  # what came before it is planned
        held_from = time.perf_counter()
        await asyncio.sleep(0.2)
        held = time.perf_counter() - held_from
        gate.open()
        await first
        first_after = time.perf_counter() - submitted
        [timings] = [chunk.generation.timings async for chunk in chunks if chunk.generation is not None]
        last_after = time.perf_counter() - submitted
        phases = timings.sharer_prefill + timings.receiver_prefill + timings.fuse
        assert timings.ttft >= phases
        assert timings.queued + timings.ttft <= first_after
        assert timings.queued + timings.ttft + timings.decode <= last_after
        assert timings.queued >= held
        await asyncio.gather(*running)

    run(scenario)


def test_leaving_a_stream_frees_its_slot(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        chunks = engine.stream(ENDLESS)
        await anext(chunks)
        assert engine.num_active == 1
        await chunks.aclose()
        await until(lambda: engine.num_active == 0)

    run(scenario)


def test_a_cancelled_task_frees_its_slot_whenever_it_is_cancelled(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        for delay in (0, 0, 0.0005, 0.002, 0.01, 0.03):
            task = asyncio.create_task(engine.generate(ENDLESS))
            await asyncio.sleep(delay)
            assert task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not engine._scheduler.has_requests)

    run(scenario)


def test_a_task_that_is_cancelled_just_when_its_prompt_was_planned_is_aborted(
    run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        scheduler, failures = engine._scheduler, list[Exception]()
        monkeypatch.setattr(scheduler._observer, "failed", failures.append)
        for _ in range(20):
            task = asyncio.create_task(engine.generate(ENDLESS))
            await asyncio.sleep(0)
            # The planners' one thread has done the work before this: it is planned, and the loop has not heard of it.
            engine._planners.submit(lambda: None).result(60)
            assert scheduler.has_requests
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not scheduler.has_requests)
        assert [type(failure) for failure in failures] == [AbortedError] * 20

    run(scenario)


def test_an_aborted_request_ends_with_an_error_wherever_it_is(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        requests = [Request(prompt=QUESTION, ignore_eos=True) for _ in range(3)]
        tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
        await until(lambda: engine.num_active == 2 and engine.num_waiting == 1)
        assert all(engine.abort(request.request_id) for request in requests)
        for task in tasks:
            with pytest.raises(AbortedError):
                await task
        assert not engine.abort(requests[0].request_id)

    run(scenario)


def hold_planning(engine: AsyncC2CEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Two events: a prompt is being planned; and, to be set, the engine goes on with it."""
    planning, go_on, plan = threading.Event(), threading.Event(), engine._scheduler.planner.plan

    def held(request: Request) -> Plan:
        planning.set()
        go_on.wait()
        return plan(request)

    monkeypatch.setattr(engine._scheduler.planner, "plan", held)
    return planning, go_on


def test_abort_reaches_a_request_that_is_still_planned(
    run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        planning, go_on = hold_planning(engine, monkeypatch)
        tasks = [asyncio.create_task(engine.generate(replace(ENDLESS, request_id=name))) for name in ("first", "next")]
        await asyncio.to_thread(planning.wait)
        assert engine.abort("first")  # its plan is being made
        assert engine.abort("next")  # its turn has not come
        assert not engine.abort("next")
        assert engine.num_waiting == 0
        go_on.set()
        for task in tasks:
            with pytest.raises(AbortedError):
                await task

    run(scenario)


def test_a_deadline_ends_a_request_that_waits_to_be_planned(
    run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        planning, go_on = hold_planning(engine, monkeypatch)
        first = asyncio.create_task(engine.generate(Request(prompt="Hi", max_new_tokens=2)))
        await asyncio.to_thread(planning.wait)
        with pytest.raises(DeadlineError):  # while the first prompt is still being planned
            await engine.generate(Request(prompt="Hi", deadline=0.01))
        assert engine.num_requests == 1
        go_on.set()
        assert (await first).token_ids

    run(scenario)


def test_closing_is_not_missed_by_a_thread_that_is_about_to_wait(
    run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        clear = engine._wake.clear

        def close_just_before() -> None:
            monkeypatch.undo()
            engine._begin_closing(None)
            clear()

        monkeypatch.setattr(engine._wake, "clear", close_just_before)
        engine._wake.set()
        await asyncio.wait_for(asyncio.to_thread(engine._thread.join), 30)

    run(scenario)


def test_what_waits_to_be_planned_when_the_engine_fails_gets_its_error(
    run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        planning, go_on = hold_planning(engine, monkeypatch)
        tasks = [asyncio.create_task(engine.generate(Request(prompt="Hi"))) for _ in range(3)]
        await asyncio.to_thread(planning.wait)

        def fail() -> bool:
            raise RuntimeError("the driver is gone")

        monkeypatch.setattr(engine._scheduler, "step", fail)
        engine._wake.set()
        for task in tasks:
            with pytest.raises(C2CError, match="the driver is gone"):
                await asyncio.wait_for(task, 30)
        go_on.set()
        await engine.close()

    run(scenario)


def test_closing_gives_up_what_is_still_planned(run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch):
    async def scenario(engine: AsyncC2CEngine) -> None:
        planning, go_on = hold_planning(engine, monkeypatch)
        task = asyncio.create_task(engine.generate(ENDLESS))
        await asyncio.to_thread(planning.wait)
        closing = asyncio.create_task(engine.close(drain_seconds=0))
        await until(lambda: not engine.ready)
        go_on.set()
        await closing
        with pytest.raises(ClosedError):
            await task

    run(scenario)


def test_errors_of_submission_come_at_once(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        with pytest.raises(UsageError, match="sharer 9"):
            await engine.generate(Request(prompt=QUESTION, sharers=[9]))
        tasks = [asyncio.create_task(engine.generate(Request(prompt=QUESTION, ignore_eos=True))) for _ in range(2)]
        await until(lambda: engine.num_active == 2)
        tasks.append(asyncio.create_task(engine.generate(Request(prompt=QUESTION, ignore_eos=True))))
        await until(lambda: engine.num_waiting == 1)
        with pytest.raises(QueueFullError):
            await engine.generate(ENDLESS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario, max_waiting=1)


def test_closing_finishes_what_runs_and_takes_nothing_more(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        gate = DecodeGate(engine)
        tasks = [
            asyncio.create_task(engine.generate(Request(prompt=QUESTION, max_new_tokens=20, ignore_eos=True)))
            for _ in range(4)
        ]
        await until(lambda: engine.num_active == 2 and engine.num_waiting == 2)
        closing = asyncio.create_task(engine.close())
        await until(lambda: not engine.ready)
        with pytest.raises(ClosedError, match="closing"):
            await engine.generate(ENDLESS)
        gate.open()
        await closing
        assert [len((await task).token_ids) for task in tasks] == [20] * 4

    run(scenario)


@pytest.mark.parametrize("seconds", ["1", float("nan"), -1, True])
def test_closing_in_no_number_of_seconds_is_refused(run: Callable[..., AsyncC2CEngine], seconds: Any):
    async def scenario(engine: AsyncC2CEngine) -> None:
        with pytest.raises(UsageError, match="drain_seconds"):
            await engine.close(drain_seconds=seconds)
        assert (await engine.generate(Request(prompt="Hi", max_new_tokens=2))).token_ids

    run(scenario)


def test_closing_returns_what_is_not_done_in_time(run: Callable[..., AsyncC2CEngine]):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        tasks = [asyncio.create_task(engine.generate(Request(prompt=QUESTION, ignore_eos=True))) for _ in range(3)]
        await until(lambda: engine.num_active == 2 and engine.num_waiting == 1)
        await engine.close(drain_seconds=0.0)
        for task in tasks:
            with pytest.raises(ClosedError, match="closed before"):
                await task

    run(scenario)


def test_a_scheduler_that_breaks_ends_every_request_and_takes_none(
    run: Callable[..., AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        DecodeGate(engine)
        tasks = [asyncio.create_task(engine.generate(Request(prompt=QUESTION, ignore_eos=True))) for _ in range(3)]
        await until(lambda: engine.num_active == 2 and engine.num_waiting == 1)

        def break_down() -> bool:
            raise RuntimeError("a fault of ours")

        monkeypatch.setattr(engine._scheduler, "_decode", break_down)
        for task in tasks:
            with pytest.raises(C2CError, match="a fault of ours"):
                await task
        assert not engine.ready
        with pytest.raises(C2CError, match="a fault of ours"):
            await engine.generate(ENDLESS)

    run(scenario)


def test_text_and_tokens_are_the_receivers(
    run: Callable[..., AsyncC2CEngine], recorded_pipeline: Callable[[str], C2CPipeline]
):
    async def scenario(engine: AsyncC2CEngine) -> None:
        ids = engine.tokenize("Hello there")
        assert ids == recorded_pipeline(NAME).receiver_tokenizer.encode("Hello there").ids
        assert "".join(engine.token_text(token) for token in ids).strip() == "Hello there"

    run(scenario)


ENDS_WHILE_A_REQUEST_RUNS = """
import asyncio, sys
from runtime import AsyncC2CEngine, Request

async def main():
    engine = AsyncC2CEngine.from_bundle(sys.argv[1], num_threads=1, allow_unchecked=True)
    tasks = [asyncio.create_task(engine.generate(Request(prompt="Hi", ignore_eos=True))) for _ in range(20)]
    await anext(engine.stream(Request(prompt="Hi", ignore_eos=True)))
    raise ValueError("the caller's own fault")

asyncio.run(main())
"""


def test_a_process_that_ends_while_requests_run_has_its_own_status(recorded_bundle: BundleOf):
    command = [sys.executable, "-c", ENDS_WHILE_A_REQUEST_RUNS, str(recorded_bundle(NAME))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "the caller's own fault" in done.stderr
    assert "terminate called" not in done.stderr
