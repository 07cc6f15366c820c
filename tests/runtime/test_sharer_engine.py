"""A sharer by itself: its rows are those of the pipeline, bit by bit; an engine without sharers answers from them."""

import asyncio
import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import AsyncC2CEngine, C2CError, C2CPipeline, Request, UncheckedEngineWarning, UsageError
from runtime.kept_rows import SharerRows
from runtime.prompt import ModelTokens
from runtime.sharer_engine import SharerEngine

UNALIGNED, ALIGNED, TWO_SHARERS = "qwen3_from_qwen2", "llama_from_gemma3_aligned", "two_sharers_parallel"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris, it is."}
CHAT = [QUESTION, ANSWER, {"role": "user", "content": "And of Spain?"}]

BundleOf = Callable[[str], Path]
PipelineOf = Callable[[str], C2CPipeline]


def every(*names: str) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


every_kind = every(UNALIGNED, ALIGNED, TWO_SHARERS)
one = every(ALIGNED)


def sharer_of(bundle: Path, number: int = 0, **options: Any) -> SharerEngine:
    return SharerEngine.from_bundle(bundle, number, num_threads=1, allow_unchecked=True, **options)


def engine_without_sharers(bundle: Path) -> AsyncC2CEngine:
    return AsyncC2CEngine.from_bundle(bundle, num_threads=1, num_slots=2, allow_unchecked=True, load_sharers=False)


def tokens_of(pipe: C2CPipeline, prompt: Any) -> dict[int, ModelTokens]:
    """What each sharer reads of a prompt."""
    with pipe.prefill(prompt) as session:
        return dict(pipe.prefiller.target(session.plan).sharers)


def assert_same_bits(rows: SharerRows, expected: SharerRows) -> None:
    assert rows.rows.keys() == expected.rows.keys()
    for name, values in rows.rows.items():
        assert values.dtype == expected.rows[name].dtype
        np.testing.assert_array_equal(values, expected.rows[name], err_msg=name)


@every_kind
def test_rows_are_those_of_the_whole_pipeline_bit_for_bit(
    name: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(name)
    with pipe.prefill(CHAT) as session:
        for number, tokens in pipe.prefiller.target(session.plan).sharers.items():
            rows = sharer_of(recorded_bundle(name), number).prefill(tokens)
            assert rows.number == number
            pool = pipe.prefiller.sharers[number].pool
            read = {spec.name for spec in pipe.prefiller.fusers[number].sharer_caches}
            assert rows.rows.keys() == read
            expected = pool.take_rows(rows.rows, session.slot, 0, len(tokens.ids))
            assert_same_bits(rows, SharerRows(number, tokens, expected))


@dataclass
class Promised:
    """Takes what sharers are to read, and gives futures that others keep."""

    futures: dict[int, "Future[SharerRows]"]
    asked: dict[int, ModelTokens] = field(default_factory=dict)

    def __call__(self, tokens: Mapping[int, ModelTokens]) -> dict[int, "Future[SharerRows]"]:
        assert not self.asked, "asked twice"
        self.asked.update(tokens)
        return self.futures


@every_kind
def test_an_engine_without_sharers_answers_from_rows_that_come_later(
    name: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf
):
    pipe, bundle = recorded_pipeline(name), recorded_bundle(name)
    expected = [pipe.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in ([QUESTION], CHAT)]
    sharers = {number: sharer_of(bundle, number) for number in tokens_of(pipe, CHAT)}

    async def answer() -> list[list[int]]:
        found = []
        async with engine_without_sharers(bundle) as engine:
            for prompt in ([QUESTION], CHAT):  # the second reuses what the first left
                promised = Promised({number: Future() for number in sharers})
                request = Request(prompt=prompt, max_new_tokens=12, ignore_eos=True, read_sharers=promised)
                generation = asyncio.create_task(engine.generate(request))
                await asyncio.sleep(0.1)
                assert not generation.done()
                assert promised.asked.keys() == sharers.keys()
                for number, tokens in promised.asked.items():
                    rows = await asyncio.to_thread(sharers[number].prefill, tokens)
                    promised.futures[number].set_result(read_only(rows))
                found.append((await generation).token_ids)
        return found

    assert asyncio.run(answer()) == [generation.token_ids for generation in expected]


def read_only(rows: SharerRows) -> SharerRows:
    """What another process gets of rows that lie in shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) >= len(rows.rows), "rows travel out of band, uncopied"
    received: SharerRows = pickle.loads(data, buffers=[memoryview(buffer).toreadonly() for buffer in buffers])
    assert not any(values.flags.writeable for values in received.rows.values())
    return received


@one
def test_an_engine_without_sharers_refuses_a_request_without_their_rows(name: str, recorded_bundle: BundleOf):
    async def ask() -> None:
        async with engine_without_sharers(recorded_bundle(name)) as engine:
            with pytest.raises(C2CError, match=r"sharer 0 is not loaded .*read_sharers"):
                await engine.generate(Request(prompt=CHAT, max_new_tokens=2))
            alone = await engine.generate(Request(prompt=CHAT, max_new_tokens=2, fuse=False, ignore_eos=True))
            assert len(alone.token_ids) == 2

    asyncio.run(ask())


@every_kind
@pytest.mark.parametrize("num_slots", [1, 3])
def test_what_was_read_before_changes_nothing(
    name: str, num_slots: int, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf
):
    tokens = tokens_of(recorded_pipeline(name), CHAT)[0]
    bundle = recorded_bundle(name)
    used = sharer_of(bundle, num_slots=num_slots)
    other = ModelTokens(tokens.ids[::-1].copy(), tokens.position_ids)
    num_tokens = len(tokens.ids)
    for length in (5, 1, 2, num_tokens, 1, 7, num_tokens - 1, num_tokens, num_tokens - 2, 3, num_tokens):
        for read in (tokens, other):
            part = ModelTokens(read.ids[:length], read.position_ids[:length])
            assert_same_bits(used.prefill(part), sharer_of_fresh(bundle).prefill(part))


fresh_sharers: dict[Path, SharerEngine] = {}


def sharer_of_fresh(bundle: Path) -> SharerEngine:
    """A sharer that holds nothing: its one slot is filled with what has nothing in common with any prompt."""
    sharer = fresh_sharers.setdefault(bundle, sharer_of(bundle, num_slots=1))
    sharer.prefill(ModelTokens(np.zeros(2, dtype=np.int64), np.array([100, 101])))
    return sharer


@one
def test_a_prompt_that_begins_like_another_leaves_the_other_its_rows(
    name: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf
):
    tokens = tokens_of(recorded_pipeline(name), CHAT)[0]
    sharer = sharer_of(recorded_bundle(name), num_slots=2)
    counted: list[int] = []
    run = sharer._sharer.run

    def count(slot: int, ids: Any, *arguments: Any, **options: Any) -> None:
        counted.append(len(ids))
        run(slot, ids, *arguments, **options)

    sharer._sharer.run = count  # type: ignore[method-assign]
    num_tokens = len(tokens.ids)
    branch = ModelTokens(np.concatenate([tokens.ids[:8], tokens.ids[8:][::-1]]), tokens.position_ids)
    sharer.prefill(tokens)
    sharer.prefill(branch)
    sharer.prefill(tokens)
    sharer.prefill(branch)
    same = int(np.argmin(tokens.ids == branch.ids))
    assert counted == [num_tokens, num_tokens - same]


@one
def test_threads_may_ask_at_once(name: str, recorded_bundle: BundleOf, recorded_pipeline: PipelineOf):
    tokens = tokens_of(recorded_pipeline(name), CHAT)[0]
    bundle = recorded_bundle(name)
    sharer = sharer_of(bundle, num_slots=2)
    parts = [ModelTokens(tokens.ids[:length], tokens.position_ids[:length]) for length in (4, 9, 13, len(tokens.ids))]
    expected = [sharer_of_fresh(bundle).prefill(part) for part in parts]
    found: dict[int, SharerRows] = {}
    threads = [
        threading.Thread(target=lambda number=number, part=part: found.update({number: sharer.prefill(part)}))
        for number, part in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in enumerate(expected):
        assert_same_bits(found[number], rows)


@one
def test_what_cannot_be_is_refused_by_name(name: str, recorded_bundle: BundleOf):
    bundle = recorded_bundle(name)
    with pytest.raises(UsageError, match=r"sharer 1: .* has 1 sharers, numbered from 0"):
        sharer_of(bundle, 1)
    with pytest.raises(UsageError, match="num_threads is 0"):
        SharerEngine.from_bundle(bundle, 0, num_threads=0)
    with pytest.raises(UsageError, match="has no engine ort-cpu in int4"):
        sharer_of(bundle, precision="int4")
    sharer = sharer_of(bundle)
    with pytest.raises(UsageError, match="0 tokens to read: expected 1 to 256"):
        sharer.prefill(ModelTokens(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)))
    with pytest.raises(C2CError, match="token id 100000: expected ids from 0 to"):
        sharer.prefill(ModelTokens(np.array([1, 100_000]), np.arange(2)))


@pytest.mark.xdist_group("gates_closed")
def test_a_sharer_that_computes_nothing_is_refused(recorded_bundle: BundleOf):
    with pytest.raises(UsageError, match="sharer 0: all gates of its fuser are closed"):
        sharer_of(recorded_bundle("gates_closed"))


@one
def test_an_unchecked_engine_is_warned_of(name: str, recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("runtime.checked._warned_of", set())
    with pytest.warns(UncheckedEngineWarning, match="never checked"):
        SharerEngine.from_bundle(recorded_bundle(name), 0, num_threads=1)
