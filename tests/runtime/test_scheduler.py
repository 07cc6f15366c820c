"""In-flight batching: every request is answered as it is alone, bit for bit, and none leaves anything behind."""

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from c2c_export.errors import C2CError, UsageError
from runtime import (
    AbortedError,
    C2CPipeline,
    Chunk,
    DeadlineError,
    Generation,
    QueueFullError,
    Request,
    SamplingParams,
    SchedulerObserver,
    SchedulerOptions,
)
from runtime.active_request import ActiveRequest
from runtime.conversation import Conversation
from runtime.decoder import Decoder
from runtime.kept_rows import SharerRows
from runtime.row_keeper import RowKeeper
from runtime.scheduler import Scheduler

UNALIGNED, CLOSING_PADDING, ALIGNED = "qwen3_from_qwen2", "qwen3_from_llama_aligned", "llama_from_gemma3_aligned"
SEQUENTIAL, PARALLEL = "two_sharers_sequential", "two_sharers_parallel"
PAIRS = (UNALIGNED, CLOSING_PADDING, ALIGNED, SEQUENTIAL, PARALLEL)

SYSTEM = {"role": "system", "content": "Be brief, and answer in one word."}
QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "Which country is the city of Porto in, and which is Lyon in?",
    "List all months " + "and days " * 12,
)

PipelineOf = Callable[[str], C2CPipeline]


def every(*names: str) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


every_pair = every(*PAIRS)


@dataclass
class Outcome:
    """What a request's listener heard."""

    chunks: list[Chunk] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def __call__(self, event: Chunk | Exception) -> None:
        assert not self.ended, "an event after the last"
        if isinstance(event, Exception):
            self.errors.append(event)
        else:
            self.chunks.append(event)

    @property
    def ended(self) -> bool:
        return bool(self.errors) or bool(self.chunks and self.chunks[-1].generation)

    @property
    def generation(self) -> Generation:
        assert not self.errors, self.errors
        generation = self.chunks[-1].generation
        assert generation is not None
        return generation


@dataclass
class Watcher(SchedulerObserver):
    """What the scheduler told."""

    decoding: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    finishes: int = 0
    failures: list[Exception] = field(default_factory=list)

    def stepped(self, num_decoding: int, num_prefilling: int, num_waiting: int, cached_bytes: int) -> None:
        self.decoding.append(num_decoding)

    def prefilled(self, prompt_tokens: int, reused_tokens: int) -> None:
        self.reused.append(reused_tokens)

    def finished(self, generation: Generation) -> None:
        self.finishes += 1

    def failed(self, error: Exception) -> None:
        self.failures.append(error)


@pytest.fixture(scope="session")
def pipelines(recorded_bundle: Callable[[str], Path]) -> PipelineOf:
    """A pipeline of four slots over a recorded pair, loaded once; schedulers take its slots by turns."""
    loaded: dict[str, C2CPipeline] = {}

    def find_or_load(name: str) -> C2CPipeline:
        if name not in loaded:
            loaded[name] = C2CPipeline.from_bundle(
                recorded_bundle(name), num_threads=1, num_slots=4, allow_unchecked=True
            )
        pipe = loaded[name]
        pipe._free_slots[:] = range(4)
        return pipe

    return find_or_load


def small_pieces(scheduler: Scheduler, rows: int) -> None:
    """Let every piece of a prompt have so many rows, as on a slow machine, and a hundred come before a decode step."""
    asked = itertools.count(1)
    scheduler._budget.rows = lambda kind, spent: rows  # type: ignore[method-assign]
    scheduler._budget.used_up = lambda spent: next(asked) % 100 == 0  # type: ignore[method-assign]


def finish(scheduler: Scheduler, requests: Sequence[Request]) -> list[Generation]:
    outcomes = [Outcome() for _ in requests]
    for request, outcome in zip(requests, outcomes, strict=True):
        scheduler.submit(request, outcome)
    drive(scheduler)
    return [outcome.generation for outcome in outcomes]


def drive(scheduler: Scheduler) -> None:
    for _ in range(100_000):
        # The last steps copy what is to be kept.
        if not scheduler.step() and not scheduler.has_requests:
            break
    assert not scheduler.has_requests
    assert scheduler.num_free_slots == scheduler.num_slots
    assert (scheduler.num_active, scheduler.num_waiting) == (0, 0)


def alone(pipe: C2CPipeline, request: Request) -> Generation:
    """The answer of a scheduler that has nothing else to do, keeps nothing, and cuts no prompt."""
    pipe._free_slots[:] = range(4)
    return finish(Scheduler(pipe, SchedulerOptions(prefix_cache_bytes=0)), [replace(request, request_id="alone")])[0]


def assert_same_answer(name: str, found: Generation, expected: Generation) -> None:
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.logprobs is not None
    assert expected.logprobs is not None
    if name != UNALIGNED:
        # Equal floats: of every token, and of its five likeliest alternatives.
        assert found.logprobs == expected.logprobs
        return
    # Its sharer's heads keep the portable Attention, whose sums round by the number of rows in use.
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert [token for token, _ in one.alternatives] == [token for token, _ in other.alternatives]
        np.testing.assert_allclose(
            [value for _, value in one.alternatives], [value for _, value in other.alternatives], atol=2e-5
        )


def mixed_requests(name: str, seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    num_sharers = 2 if name in (SEQUENTIAL, PARALLEL) else 1
    requests = []
    for index in range(count):
        question = {"role": "user", "content": rng.choice(QUESTIONS)}
        messages = [SYSTEM, question] if rng.random() < 0.5 else [question]
        if rng.random() < 0.3:
            more = {"role": "user", "content": rng.choice(QUESTIONS)}
            messages = [*messages, {"role": "assistant", "content": "Yes, it is."}, more]
        requests.append(
            Request(
                prompt=messages if rng.random() < 0.8 else [rng.randrange(5, 60) for _ in range(rng.randrange(1, 20))],
                fuse=rng.random() < 0.8,
                sharers=rng.choice([None, [0], [num_sharers - 1]]),
                max_new_tokens=rng.randrange(1, 12),
                ignore_eos=rng.random() < 0.7,
                sampling=SamplingParams(temperature=1.0, seed=index) if rng.random() < 0.4 else SamplingParams(),
                logprobs=5,
                client=rng.choice("abc"),
                priority=rng.choice([0, 0, 1]),
            )
        )
    return requests


@every_pair
@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**30])
@pytest.mark.parametrize("rows", [2, 5, 512])
def test_every_request_is_answered_as_it_is_alone_bit_for_bit(
    name: str, prefix_cache_bytes: int, rows: int, pipelines: PipelineOf
):
    requests = mixed_requests(name, rows, 16)
    expected = [alone(pipelines(name), request) for request in requests]
    watcher = Watcher()
    scheduler = Scheduler(pipelines(name), SchedulerOptions(prefix_cache_bytes=prefix_cache_bytes), watcher)
    small_pieces(scheduler, rows)
    for found, right in zip(finish(scheduler, requests), expected, strict=True):
        assert_same_answer(name, found, right)
    assert max(watcher.decoding) == 4
    assert watcher.finishes == len(requests)
    assert bool(sum(watcher.reused)) == bool(prefix_cache_bytes)


@every_pair
def test_an_answer_is_the_pipelines(name: str, pipelines: PipelineOf, recorded_pipeline: PipelineOf):
    requests = mixed_requests(name, 7, 8)
    found = finish(Scheduler(pipelines(name)), requests)
    for request, generation in zip(requests, found, strict=True):
        ids = not isinstance(request.prompt[0], dict)
        expected = recorded_pipeline(name).generate(
            **{"input_ids" if ids else "messages": request.prompt},  # type: ignore[arg-type]
            fuse=request.fuse,
            sharers=request.sharers,
            max_new_tokens=request.max_new_tokens,
            ignore_eos=request.ignore_eos,
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
        )
        assert generation.token_ids == expected.token_ids
        assert generation.text == expected.text
        assert generation.num_prompt_tokens == expected.num_prompt_tokens


@every(UNALIGNED, CLOSING_PADDING, ALIGNED)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_aborts_and_arrivals_at_any_time_change_no_other_answer(name: str, pipelines: PipelineOf, data: st.DataObject):
    requests = mixed_requests(name, data.draw(st.integers(0, 5)), 7)
    aborted = data.draw(st.sets(st.integers(0, 6), min_size=1, max_size=4))
    arrivals = data.draw(st.lists(st.integers(0, 8), min_size=7, max_size=7))
    aborts = {index: data.draw(st.integers(0, 12)) for index in sorted(aborted)}
    expected = {
        index: alone(pipelines(name), request) for index, request in enumerate(requests) if index not in aborted
    }

    scheduler = Scheduler(pipelines(name))
    small_pieces(scheduler, data.draw(st.sampled_from([2, 7])))
    outcomes = [Outcome() for _ in requests]
    for turn in range(14):
        for index, request in enumerate(requests):
            if arrivals[index] == turn:
                scheduler.submit(request, outcomes[index])
            if aborts.get(index) == turn:
                scheduler.abort(request.request_id)
        scheduler.step()
    drive(scheduler)
    for index, right in expected.items():
        assert_same_answer(name, outcomes[index].generation, right)
    for index in aborted:
        if outcomes[index].errors:
            assert isinstance(outcomes[index].errors[0], AbortedError)


@every(UNALIGNED, ALIGNED)
def test_a_request_that_begins_as_another_is_not_prefilled_again(name: str, pipelines: PipelineOf):
    few_shot = [
        SYSTEM,
        {"role": "user", "content": QUESTIONS[2]},
        {"role": "assistant", "content": "Portugal, France."},
    ]
    prompts = [[*few_shot, {"role": "user", "content": question}] for question in QUESTIONS]
    requests = [Request(prompt=prompt, max_new_tokens=4, ignore_eos=True, logprobs=5) for prompt in prompts]
    expected = [alone(pipelines(name), request) for request in requests]
    watcher = Watcher()
    scheduler = Scheduler(pipelines(name), None, watcher)
    for request, right in zip(requests, expected, strict=True):
        assert_same_answer(name, finish(scheduler, [request])[0], right)
    shared = len(scheduler.planner.plan(replace(requests[0], prompt=few_shot[:2])).receiver.ids) // 2
    assert watcher.reused[0] == 0
    assert min(watcher.reused[1:]) > shared
    # A further turn goes on from the turn before it.
    reply = expected[0].text or "Well."
    turn = [*prompts[0], {"role": "assistant", "content": reply}, {"role": "user", "content": "Why?"}]
    request = Request(prompt=turn, max_new_tokens=4, ignore_eos=True, logprobs=5)
    right = alone(pipelines(name), request)
    assert_same_answer(name, finish(scheduler, [request])[0], right)
    assert watcher.reused[-1] > len(scheduler.planner.plan(requests[0]).receiver.ids) - 10


@every(UNALIGNED)
def test_kept_rows_stay_within_their_memory_and_the_least_recently_used_go_first(name: str, pipelines: PipelineOf):
    one = Scheduler(pipelines(name), SchedulerOptions(prefix_cache_bytes=2**30))
    first, *others = [
        Request(prompt=[{"role": "user", "content": f"{word} " * 8}], max_new_tokens=1)
        for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
    ]
    finish(one, [first])
    budget = int(one.prefix_cache.num_bytes * 3.5)
    watcher = Watcher()
    scheduler = Scheduler(pipelines(name), SchedulerOptions(prefix_cache_bytes=budget), watcher)
    for request in (first, *others):
        finish(scheduler, [request, replace(first, request_id="again")])
        assert scheduler.prefix_cache.num_bytes <= budget
    assert len(scheduler.prefix_cache) >= 2
    assert min(watcher.reused[1::2]) > 8  # `first` is used all the time, and stays


@every(UNALIGNED)
def test_a_full_queue_refuses_and_says_when_to_come_again(name: str, pipelines: PipelineOf):
    scheduler = Scheduler(pipelines(name), SchedulerOptions(max_waiting=2))
    outcomes = [Outcome() for _ in range(6)]  # four of them have a slot as soon as the scheduler goes round
    for outcome in outcomes:
        scheduler.submit(Request(prompt="Hi", max_new_tokens=2), outcome)
    with pytest.raises(QueueFullError, match="6 requests wait") as refused:
        scheduler.submit(Request(prompt="Hi", max_new_tokens=2), Outcome())
    assert refused.value.retry_after >= 1
    drive(scheduler)
    assert all(outcome.generation for outcome in outcomes)


@every(UNALIGNED)
def test_requests_past_their_deadline_end_wherever_they_are(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    scheduler = Scheduler(pipelines(name))
    small_pieces(scheduler, 2)
    running, waiting = Outcome(), [Outcome() for _ in range(5)]
    scheduler.submit(Request(prompt=QUESTIONS[3], deadline=50.0, ignore_eos=True), running)
    for outcome in waiting:
        scheduler.submit(Request(prompt=QUESTIONS[3], deadline=50.0, ignore_eos=True), outcome)
    for _ in range(5):
        scheduler.step()
    assert scheduler.num_waiting == 2
    later = itertools.count(1e9)
    monkeypatch.setattr("runtime.active_request.time.perf_counter", lambda: next(later))
    scheduler.step()
    for outcome in (running, *waiting):
        assert isinstance(outcome.errors[0], DeadlineError)
    assert not scheduler.has_requests
    assert scheduler.num_free_slots == 4


@every(UNALIGNED)
def test_what_cannot_be_served_is_refused_at_once(name: str, pipelines: PipelineOf):
    scheduler = Scheduler(pipelines(name))
    capacity = pipelines(name).bundle.manifest.max_length
    cases = [
        (Request(prompt=[5] * (capacity + 1)), f"capacity is {capacity}"),
        (Request(prompt="Hi", max_new_tokens=capacity), "exceed"),
        (Request(prompt="Hi", sharers=[7]), "sharer 7"),
        (Request(prompt=[10**9]), "token 0"),
        (Request(prompt="Hi", stop=[""]), "stop"),
        (Request(prompt=[]), "the prompt is empty"),
    ]
    for request, message in cases:
        with pytest.raises(UsageError, match=message):
            scheduler.submit(request, Outcome())
    assert not scheduler.has_requests
    for options, field_name in (
        ({"logprobs": 21}, "logprobs"),
        ({"priority": 1.5}, "priority"),
        ({"deadline": 0}, "deadline"),
        ({"client": ["x"]}, "client"),
        ({"request_id": 1}, "request_id"),
        ({"sampling": {}}, "sampling"),
        ({"deadline": float("nan")}, "deadline"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "5", "shorten": True}, "max_new_tokens"),
        ({"max_new_tokens": float("inf"), "shorten": True}, "max_new_tokens"),
        ({"fuse": "no"}, "fuse"),
        ({"shorten": None}, "shorten"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"read_sharers": {0: "rows"}}, "read_sharers"),
    ):
        with pytest.raises(UsageError, match=field_name):
            Request(prompt="Hi", **options)  # type: ignore[arg-type]
    first = Outcome()
    scheduler.submit(Request(prompt="Hi", max_new_tokens=1, request_id="same"), first)
    with pytest.raises(UsageError, match="'same' is in use"):
        scheduler.submit(Request(prompt="Hi", request_id="same"), Outcome())
    drive(scheduler)
    assert first.generation


@every(UNALIGNED)
def test_a_prompt_may_fill_the_capacity_while_others_decode(name: str, pipelines: PipelineOf):
    capacity = pipelines(name).bundle.manifest.max_length
    full = Request(prompt=[5 + index % 50 for index in range(capacity)], logprobs=5)
    others = mixed_requests(name, 3, 6)
    expected = [alone(pipelines(name), request) for request in (full, *others)]
    scheduler = Scheduler(pipelines(name))
    small_pieces(scheduler, 9)
    found = finish(scheduler, [full, *others])
    for generation, right in zip(found, expected, strict=True):
        assert_same_answer(name, generation, right)
    assert len(found[0].token_ids) == 1
    assert found[0].finish_reason == "length"


@every(UNALIGNED, ALIGNED, PARALLEL)
def test_rows_of_sharers_that_were_computed_elsewhere_give_the_same_answer(name: str, pipelines: PipelineOf):
    pipe = pipelines(name)
    request = Request(prompt=[SYSTEM, {"role": "user", "content": QUESTIONS[1]}], max_new_tokens=6, logprobs=5)
    expected = alone(pipe, request)
    plan = Scheduler(pipelines(name)).planner.plan(request)
    wanted = pipe.prefiller.target(plan).sharers
    promised: dict[int, Future[SharerRows]] = {number: Future() for number in wanted}
    scheduler = Scheduler(pipelines(name), SchedulerOptions(prefix_cache_bytes=0))
    waiting, other = Outcome(), Outcome()
    scheduler.submit(replace(request, read_sharers=lambda _: promised), waiting)
    while scheduler.step():
        pass
    assert scheduler.has_requests  # it waits, and the receiver's part is done
    scheduler.submit(Request(prompt="Hi", fuse=False, max_new_tokens=3), other)
    for _ in range(20):
        scheduler.step()
    assert other.generation  # nobody waits for one that waits
    for number, tokens in wanted.items():
        sharer = pipe.prefiller.sharers[number]
        sharer.run(3, tokens.ids, tokens.position_ids, 0)
        rows = sharer.pool.take_rows(sharer.pool.names, 3, 0, len(tokens.ids))
        for values in rows.values():
            values.setflags(write=False)  # as they come out of shared memory
        promised[number].set_result(SharerRows(number, tokens, rows))
    drive(scheduler)
    assert_same_answer(name, waiting.generation, expected)


@every(ALIGNED)
def test_sharers_elsewhere_read_nothing_for_a_request_that_is_refused(name: str, pipelines: PipelineOf):
    scheduler, asked = Scheduler(pipelines(name), SchedulerOptions(max_waiting=0)), list[object]()

    def read_sharers(tokens: object) -> Any:
        asked.append(tokens)
        raise RuntimeError("no network")

    places = [scheduler.reserve(Request(prompt="Hi")) for _ in range(4)]
    request = Request(prompt=QUESTIONS[1], read_sharers=read_sharers)
    with pytest.raises(QueueFullError):
        scheduler.submit(request, Outcome())
    assert not asked
    scheduler.give_up(places[0])
    with pytest.raises(RuntimeError, match="no network"):
        scheduler.submit(request, Outcome())
    assert len(asked) == 1
    for place in places:
        scheduler.give_up(place)
    assert not scheduler.has_requests


@every(ALIGNED)
def test_rows_of_another_prompt_and_a_failed_sharer_end_the_request_and_no_other(name: str, pipelines: PipelineOf):
    pipe = pipelines(name)
    request = Request(prompt=QUESTIONS[1], max_new_tokens=3)
    scheduler = Scheduler(pipe)
    wanted = pipe.prefiller.target(scheduler.planner.plan(replace(request, prompt=QUESTIONS[2]))).sharers[0]
    pool = pipe.prefiller.sharers[0].pool
    wrong: Future[SharerRows] = Future()
    wrong.set_result(SharerRows(0, wanted, pool.take_rows(pool.names, 0, 0, len(wanted.ids))))
    failed: Future[SharerRows] = Future()
    failed.set_exception(RuntimeError("the node is gone"))
    outcomes = [Outcome() for _ in range(3)]
    scheduler.submit(replace(request, read_sharers=lambda _: {0: wrong}, request_id="wrong"), outcomes[0])
    scheduler.submit(replace(request, read_sharers=lambda _: {0: failed}, request_id="failed"), outcomes[1])
    scheduler.submit(request, outcomes[2])
    drive(scheduler)
    assert "not those of this prompt" in str(outcomes[0].errors[0])
    assert "the node is gone" in str(outcomes[1].errors[0])
    assert isinstance(outcomes[1].errors[0], C2CError)
    assert outcomes[2].generation


@every(CLOSING_PADDING, ALIGNED, PARALLEL)
def test_rows_that_were_handed_over_are_not_taken_for_more_than_they_are(name: str, pipelines: PipelineOf):
    pipe = pipelines(name)
    first = Request(prompt=[SYSTEM, {"role": "user", "content": QUESTIONS[2]}], max_new_tokens=2)
    answer = {"role": "assistant", "content": "Portugal, and France."}
    turn = [*first.prompt, answer, {"role": "user", "content": QUESTIONS[1]}]  # type: ignore[list-item]
    further = Request(prompt=turn, max_new_tokens=6, logprobs=5)
    expected = alone(pipe, further)
    scheduler = Scheduler(pipelines(name))
    handed_over: dict[int, Future[SharerRows]] = {}
    for number, tokens in pipe.prefiller.target(scheduler.planner.plan(first)).sharers.items():
        sharer = pipe.prefiller.sharers[number]
        sharer.run(3, tokens.ids, tokens.position_ids, 0)
        fuser = pipe.bundle.manifest.sharers[number].fuser_graph
        assert fuser is not None
        read = [spec.name.removeprefix("sharer_") for spec in fuser.inputs if spec.name.startswith("sharer_")]
        names = [cache for cache in read if cache in sharer.pool.names]
        rows = SharerRows(number, tokens, sharer.pool.take_rows(names, 3, 0, len(tokens.ids)))
        sharer.clear_rows(3, len(tokens.ids))
        handed_over[number] = Future()
        handed_over[number].set_result(rows)
    finish(scheduler, [replace(first, read_sharers=lambda _: handed_over)])
    assert_same_answer(name, finish(scheduler, [further])[0], expected)


@every(ALIGNED)
def test_the_same_prompt_several_times_at_once_is_prefilled_once(name: str, pipelines: PipelineOf):
    watcher = Watcher()
    scheduler = Scheduler(pipelines(name), None, watcher)
    requests = [
        Request(prompt=QUESTIONS[2], max_new_tokens=5, sampling=SamplingParams(temperature=1.0, seed=seed), logprobs=2)
        for seed in range(4)
    ]
    found = finish(scheduler, requests)
    assert watcher.reused[0] == 0
    assert min(watcher.reused[1:]) > 8
    for request, generation in zip(requests, found, strict=True):
        assert_same_answer(name, generation, alone(pipelines(name), request))


@every(UNALIGNED)
def test_a_slot_that_overflowed_serves_the_next_request(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    pipe = pipelines(name)
    request = Request(prompt=QUESTIONS[1], max_new_tokens=4, ignore_eos=True, logprobs=2)
    expected = alone(pipe, request)
    scheduler = Scheduler(pipelines(name), SchedulerOptions(prefix_cache_bytes=0))
    outcome, pool = Outcome(), pipe.receiver.pool
    scheduler.submit(replace(request, max_new_tokens=50, request_id="overflows"), outcome)
    while not outcome.chunks:
        scheduler.step()

    def overflow(num_slots: int) -> Any:
        rows = pool.take_rows(pool.names, 0, 0, 12)
        pool.put_rows(0, 0, {cache: np.full_like(values, np.nan) for cache, values in rows.items()})
        return np.full((num_slots, pipe.bundle.manifest.receiver.vocab_size), np.nan, np.float32)

    with monkeypatch.context() as overflowing:
        overflowing.setattr(pipe.receiver, "step_logits", overflow)
        drive(scheduler)
    assert "nan" in str(outcome.errors[0])
    assert all(np.isfinite(rows).all() for rows in pool.take_rows(pool.names, 0, 0, pipe.receiver.capacity).values())
    assert_same_answer(name, finish(scheduler, [request])[0], expected)


@every(UNALIGNED)
def test_a_slot_whose_prefill_was_aborted_leaves_no_nan_to_the_next_request(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    pipe = pipelines(name)
    request = Request(prompt=[7, 8, 9, 10, 11], max_new_tokens=4, ignore_eos=True, logprobs=2)
    expected = alone(pipe, request)
    scheduler, outcome = Scheduler(pipelines(name), SchedulerOptions(prefix_cache_bytes=0)), Outcome()
    small_pieces(scheduler, 8)
    with monkeypatch.context() as overflowing:
        for decoder in pipe.decoders:
            overflowing.setattr(decoder, "run", overflowing_run(decoder))
        long = Request(prompt=[5 + index % 50 for index in range(150)], max_new_tokens=1)
        scheduler.submit(long, outcome)
        for _ in range(8):
            scheduler.step()
        assert scheduler.num_active == 1
        scheduler.abort(long.request_id)
        drive(scheduler)
    assert isinstance(outcome.errors[0], AbortedError)
    assert_same_answer(name, finish(scheduler, [request])[0], expected)


def overflowing_run(decoder: Decoder) -> Callable[..., None]:
    run = decoder.run

    def overflow(slot: int, ids: Any, position_ids: Any, write_index: int, **options: Any) -> None:
        run(slot, ids, position_ids, write_index, **options)
        rows = decoder.pool.take_rows(decoder.pool.names, slot, write_index, write_index + len(ids))
        nan = {cache: np.full_like(values, np.nan) for cache, values in rows.items()}
        decoder.pool.put_rows(slot, write_index, nan)

    return overflow


@every(UNALIGNED)
def test_an_id_may_come_again_while_its_first_request_is_planned(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    watcher, first, second = Watcher(), Outcome(), Outcome()
    scheduler = Scheduler(pipelines(name), None, watcher)
    request = Request(prompt="Hi", max_new_tokens=3, ignore_eos=True, request_id="same")
    place, plan = scheduler.reserve(request), scheduler.planner.plan

    def plan_while_it_comes_again(planned: Request) -> Any:
        monkeypatch.setattr(scheduler.planner, "plan", plan)
        scheduler.give_up(place)
        scheduler.submit(request, second)
        return plan(planned)

    monkeypatch.setattr(scheduler.planner, "plan", plan_while_it_comes_again)
    with pytest.raises(AbortedError):
        scheduler.submit(request, first, place)
    drive(scheduler)
    assert not first.ended
    assert len(second.generation.token_ids) == 3
    assert [type(error) for error in watcher.failures] == [AbortedError]
    scheduler.give_up(place)  # it has ended, and nothing else is meant
    assert not scheduler.abort("same")


@every(UNALIGNED)
def test_a_request_may_be_aborted_while_it_is_planned(name: str, pipelines: PipelineOf):
    watcher = Watcher()
    scheduler = Scheduler(pipelines(name), None, watcher)
    request = Request(prompt="Hi")
    place = scheduler.reserve(request)
    assert scheduler.abort(request.request_id)
    assert not scheduler.abort(request.request_id)
    with pytest.raises(AbortedError):
        scheduler.submit(request, Outcome(), place)
    assert not scheduler.has_requests
    assert [type(error) for error in watcher.failures] == [AbortedError]


@every(UNALIGNED)
def test_rows_that_cannot_be_kept_harm_no_answer_and_are_not_tried_again(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    request = Request(prompt=QUESTIONS[3], max_new_tokens=6, ignore_eos=True, logprobs=5)
    expected = alone(pipelines(name), request)
    tries: list[int] = []

    def fail(keeper: RowKeeper, max_rows: int) -> int:
        tries.append(max_rows)
        raise MemoryError("no room")

    monkeypatch.setattr(RowKeeper, "advance", fail)
    scheduler = Scheduler(pipelines(name))
    other = Outcome()
    scheduler.submit(Request(prompt="Hi", max_new_tokens=20, ignore_eos=True), other)
    assert_same_answer(name, finish(scheduler, [request])[0], expected)
    assert other.generation
    assert len(tries) == 2  # one for each prompt
    assert (len(scheduler.prefix_cache), scheduler.prefix_cache.num_bytes) == (0, 0)


@every(ALIGNED)
def test_requests_go_on_while_another_prompt_is_put_back_and_kept(name: str, pipelines: PipelineOf):
    scheduler = Scheduler(pipelines(name))
    prompt = [SYSTEM, {"role": "user", "content": QUESTIONS[3]}]
    finish(scheduler, [Request(prompt=prompt, max_new_tokens=1)])
    small_pieces(scheduler, 2)
    scheduler._budget.used_up = lambda spent: True  # type: ignore[method-assign]
    running, again = Outcome(), Outcome()
    scheduler.submit(Request(prompt="Hi", max_new_tokens=200, ignore_eos=True), running)
    while not running.chunks:
        scheduler.step()
    scheduler.submit(Request(prompt=[*prompt[:1], {"role": "user", "content": QUESTIONS[3] + " Well?"}]), again)
    tokens = len(running.chunks)
    while not again.chunks:
        scheduler.step()
        tokens += 1
        assert len(running.chunks) == tokens, "a step without a token"
    # Two rows at a time of the receiver, and as many of the sharer.
    num_rows = len(scheduler.planner.plan(Request(prompt=prompt)).receiver.ids)
    assert tokens > num_rows
    drive(scheduler)


@every(ALIGNED)
def test_a_slot_is_anothers_when_its_prompt_is_copied(name: str, pipelines: PipelineOf):
    watcher = Watcher()
    scheduler = Scheduler(pipelines(name), None, watcher)
    request = Request(prompt=QUESTIONS[3], max_new_tokens=1, logprobs=5)
    expected = alone(pipelines(name), request)
    scheduler = Scheduler(pipelines(name), None, watcher)
    small_pieces(scheduler, 2)
    running, short = Outcome(), Outcome()
    scheduler.submit(Request(prompt="Hi", max_new_tokens=200, ignore_eos=True), running)
    while not running.chunks:
        scheduler.step()
    scheduler._budget.used_up = lambda spent: True  # type: ignore[method-assign]
    scheduler.submit(request, short)
    while not short.ended:
        scheduler.step()
    assert scheduler.num_active == 1
    assert scheduler.num_free_slots == 2
    while scheduler.num_free_slots < 3:
        scheduler.step()
    assert_same_answer(name, finish(scheduler, [replace(request, request_id="again")])[0], expected)
    assert watcher.reused[-1] > 8
    drive(scheduler)


@every(UNALIGNED)
def test_a_listener_that_fails_ends_its_own_request_alone_and_hears_no_more(name: str, pipelines: PipelineOf):
    scheduler, told = Scheduler(pipelines(name)), Outcome()
    heard: list[object] = []

    def fail(event: object) -> None:
        heard.append(event)
        raise RuntimeError("nobody listens")

    scheduler.submit(Request(prompt="Hi", ignore_eos=True), fail)
    scheduler.submit(Request(prompt="Hi", max_new_tokens=5, ignore_eos=True), told)
    drive(scheduler)
    assert len(told.generation.token_ids) == 5
    assert len(heard) == 1


@every(UNALIGNED)
def test_an_observer_that_fails_ends_nothing(name: str, pipelines: PipelineOf):
    class Failing(SchedulerObserver):
        pass

    def fail(*_: object) -> None:
        raise RuntimeError("nothing is counted")

    for told in ("queued", "started", "prefilled", "first_token", "next_token", "finished", "failed", "stepped"):
        assert hasattr(SchedulerObserver, told)
        setattr(Failing, told, fail)
    scheduler = Scheduler(pipelines(name), None, Failing())
    scheduler.give_up(scheduler.reserve(Request(prompt="Hi")))
    assert len(finish(scheduler, [Request(prompt="Hi", max_new_tokens=3, ignore_eos=True)])[0].token_ids) == 3


@every(UNALIGNED)
def test_a_fault_in_choosing_one_requests_token_ends_no_other(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    scheduler, outcomes = Scheduler(pipelines(name)), [Outcome(), Outcome()]
    for index, outcome in enumerate(outcomes):
        request = Request(prompt="Hi", max_new_tokens=8, ignore_eos=True, logprobs=index)
        scheduler.submit(request, outcome)
    take_token = ActiveRequest.take_token

    def fail(active: ActiveRequest, logits: Any) -> Chunk:
        if active.request.logprobs and len(active.reply.token_ids) == 3:
            raise MemoryError("no room to sort")
        return take_token(active, logits)

    monkeypatch.setattr(ActiveRequest, "take_token", fail)
    drive(scheduler)
    assert len(outcomes[0].generation.token_ids) == 8
    assert "no room to sort" in str(outcomes[1].errors[0])


@every(UNALIGNED)
def test_an_engine_that_fails_in_a_step_fails_its_requests_and_serves_the_next(
    name: str, pipelines: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    scheduler = Scheduler(pipelines(name))
    outcome = Outcome()
    scheduler.submit(Request(prompt="Hi", max_new_tokens=5, ignore_eos=True), outcome)
    scheduler.step()

    def fail(*_: object) -> None:
        raise C2CError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(pipelines(name).receiver, "run_step", fail)
        drive(scheduler)
    assert "out of memory" in str(outcome.errors[0])
    assert finish(scheduler, [Request(prompt="Hi", max_new_tokens=5, ignore_eos=True)])[0].finish_reason == "length"


@every(CLOSING_PADDING)
def test_logprobs_are_those_of_the_models_logits(name: str, pipelines: PipelineOf, recorded_pipeline: PipelineOf):
    request = Request(prompt=QUESTIONS[1], max_new_tokens=3, ignore_eos=True, logprobs=4)
    found = finish(Scheduler(pipelines(name)), [request])[0]
    assert found.logprobs is not None
    with recorded_pipeline(name).prefill(QUESTIONS[1]) as session:
        score = session.score(found.token_ids)
        logits = session.logits.astype(np.float64)
    assert [logprob.token_id for logprob in found.logprobs] == found.token_ids
    np.testing.assert_allclose([entry.logprob for entry in found.logprobs], score.log_probabilities, atol=1e-6)
    likeliest = np.argsort(-logits, kind="stable")[:4]
    assert [token for token, _ in found.logprobs[0].alternatives] == likeliest.tolist()
    assert found.logprobs[0].alternatives[0][1] == found.logprobs[0].logprob  # greedy


@every(UNALIGNED)
def test_requests_may_be_submitted_and_aborted_by_many_threads(name: str, pipelines: PipelineOf):
    scheduler = Scheduler(pipelines(name), SchedulerOptions(max_waiting=500))
    outcomes: dict[str, Outcome] = {}
    aborted_before, aborted_while_stepping = set[str](), set[str]()
    half = threading.Barrier(5)

    def submit(worker: int) -> None:
        for index in range(25):
            if index == 12:
                half.wait()
            request_id, outcome = f"{worker}.{index}", Outcome()
            outcomes[request_id] = outcome
            scheduler.submit(Request(prompt=[5 + worker, 6 + index], max_new_tokens=3, request_id=request_id), outcome)
            if index % 5 == 0:
                scheduler.abort(request_id)
                (aborted_before if index < 12 else aborted_while_stepping).add(request_id)

    threads = [threading.Thread(target=submit, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    half.wait()
    while any(thread.is_alive() for thread in threads) or scheduler.has_requests:
        scheduler.step()
    assert len(outcomes) == 100
    assert all(outcome.ended for outcome in outcomes.values())
    failed = {request_id for request_id, outcome in outcomes.items() if outcome.errors}
    # Those of the second half may have been done.
    assert failed - aborted_while_stepping == aborted_before
    assert all(isinstance(outcomes[request_id].errors[0], AbortedError) for request_id in failed)
    assert scheduler.num_free_slots == 4


def test_a_pipeline_with_an_open_session_gives_no_slots(recorded_bundle: Callable[[str], Path]):
    pipe = C2CPipeline.from_bundle(recorded_bundle(UNALIGNED), num_threads=1, num_slots=2, allow_unchecked=True)
    with pipe.prefill("Hi"), pytest.raises(C2CError, match="close them"):
        Scheduler(pipe)
    Scheduler(pipe)
    with pytest.raises(C2CError, match="slots are in use"):
        pipe.prefill("Hi")


def test_conversations_are_told_from_ids():
    assert Conversation.of([1, 2]).ids == [1, 2]
    assert Conversation.of("Hi").messages is not None
