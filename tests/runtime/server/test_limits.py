"""Keys, sizes, times and queues: who is turned away, how, and that all others are served."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from decode_gate import DecodeGate
from openai import AsyncOpenAI, RateLimitError
from served import Served, refused, served_here, wait_until

from runtime import C2CPipeline, UsageError
from runtime.async_engine import AsyncC2CEngine
from runtime.scheduler_options import SchedulerOptions
from runtime.server import limits
from runtime.server.app import create_app
from runtime.server.metrics import ServerMetrics
from runtime.server.settings import ServerSettings

PAIR = "qwen3_from_llama_aligned"
CHATS = "/v1/chat/completions"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
KEYS = ("first-key", "second-key")

pytestmark = pytest.mark.xdist_group(PAIR)


# --- keys ---


@pytest.fixture(scope="module")
def guarded(engine: AsyncC2CEngine) -> Iterator[Served]:
    with served_here(engine, model_name="m", api_keys=KEYS) as served:
        yield served


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer first-ke", "Bearer", "Basic first-key", "Bearer \xe4"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/v1/c2c", CHATS, "/v1/completions"])
def test_without_a_key_nothing_is_served(path: str, given: str | None, guarded: Served):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    method, body = ("POST", CHAT) if path.endswith("completions") else ("GET", None)
    with guarded.http() as client:
        response = client.request(method, path, json=body, headers=headers)
    assert refused(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_will_do(key: str, guarded: Served):
    with guarded.openai(key) as client:
        assert [model.id for model in client.models.list()] == ["m", "m-receiver"]
        assert client.chat.completions.create(**CHAT).usage.completion_tokens == 2


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/openapi.json"])
def test_what_watches_the_process_needs_no_key(path: str, guarded: Served):
    with guarded.http() as client:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_carry_is_refused(key: str):
    with pytest.raises(UsageError, match="api_keys"):
        ServerSettings(api_keys=(key,))


def test_without_a_key_no_body_is_waited_for(guarded: Served):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
    # Closed by the server: without a body the connection cannot go on.
    answer = raw(guarded, head + b"Expect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(guarded.url.rsplit(":", 1)[1])), timeout=20) as connection:
        connection.sendall(head + b"\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        # What is left of it is passed over, and the next request answered.
        connection.sendall(b" " * 999_999 + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert b"HTTP/1.1 200 " in received
    assert time.monotonic() - begun < limits.BODY_TIMEOUT / 2


# --- bodies ---


@pytest.fixture(scope="module")
def small(engine: AsyncC2CEngine) -> Iterator[Served]:
    with served_here(engine, model_name="m", max_body=2000, max_tokens=8, max_choices=3) as served:
        yield served


def raw(served: Served, *parts: bytes, pause: float = 0) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_body_of_the_limit_is_read(small: Served):
    content = json.dumps(CHAT).encode()
    with small.http() as client:
        headers = {"Content-Type": "application/json"}
        assert client.post(CHATS, content=content.ljust(2000), headers=headers).status_code == 200
        error = refused(client.post(CHATS, content=content.ljust(2001), headers=headers), 413)
    assert error["message"] == "the body is too large; this server takes at most 2000 bytes"
    assert error["code"] == "body_too_large"


def test_a_body_without_a_length_is_measured_as_it_comes(small: Served):
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    with small.http() as client:
        refused(client.post(CHATS, content=pieces(), headers={"Content-Type": "application/json"}), 413)


def test_a_large_body_is_refused_although_it_was_sent_whole(small: Served):
    # The client sends it all before it reads: the answer must not be lost with the connection.
    with small.http() as client:
        refused(client.post(CHATS, content=b" " * 20_000_000), 413)


def test_a_client_that_asks_first_is_told_at_once(small: Served):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\nExpect: 100-continue\r\n\r\n"
    assert raw(small, head).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("length", [b"10, 20", b"-5", b"abc", b"9" * 30])
def test_a_length_that_is_none_is_refused(length: bytes, small: Served):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: "
    answer = raw(small, head + length + b"\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"413")


def test_a_body_with_two_lengths_is_refused_and_the_connection_closed(small: Served):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(small, head + b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"code":"ambiguous_length"' in answer


def test_a_body_longer_than_its_length_is_cut(small: Served):
    content = json.dumps(CHAT).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    answer = raw(small, head % len(content), content + b" " * 5000)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 200 ") == 1


def test_a_body_that_does_not_come_is_not_waited_for(small: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "BODY_TIMEOUT", 0.2)
    answer = raw(small, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


# --- tokens and answers ---


def test_more_tokens_than_allowed_are_refused_by_the_fields_name(small: Served):
    with small.http() as client:
        for field in ("max_tokens", "max_completion_tokens"):
            body = {**CHAT, "max_tokens": None, field: 9}
            error = refused(client.post(CHATS, json=body), 400)
            assert error["param"] == field
            assert f"{field}: 9 is not allowed; this server generates at most 8 tokens" in error["message"]
        body = {"model": "m", "prompt": "Hi", "max_tokens": 9}
        assert refused(client.post("/v1/completions", json=body), 400)["param"] == "max_tokens"


def test_who_asks_for_no_number_of_tokens_gets_what_is_allowed(small: Served):
    extra = {"ignore_eos": True}
    with small.openai() as client:
        messages: Any = CHAT["messages"]
        chat = client.chat.completions.create(model="m", messages=messages, extra_body=extra)
        completion = client.completions.create(model="m", prompt="Hi", extra_body=extra)
        capacity = small.engine.bundle.manifest.max_length
        full = client.completions.create(model="m", prompt=[5] * (capacity - 3), extra_body=extra)
    assert [out.usage.completion_tokens for out in (chat, completion, full)] == [8, 8, 4]


def test_more_answers_than_allowed_are_refused(small: Served):
    with small.http() as client:
        assert client.post(CHATS, json=CHAT | {"n": 3}).status_code == 200
        assert "at most 3" in refused(client.post(CHATS, json=CHAT | {"n": 4}), 400)["message"]


def test_a_higher_priority_than_allowed_is_refused(small: Served, engine: AsyncC2CEngine):
    with small.http() as client:
        error = refused(client.post(CHATS, json=CHAT | {"priority": 1}), 400)
        assert (error["param"], error["message"]) == (
            "priority",
            "priority: 1 is not allowed; this server takes at most 0",
        )
        assert client.post(CHATS, json=CHAT | {"priority": -100}).status_code == 200
    for most, priority, status in ((7, 7, 200), (7, 8, 400), (-5, None, 200), (-5, 0, 400)):
        with served_here(engine, model_name="m", max_priority=most) as served, served.http() as client:
            assert client.post(CHATS, json=CHAT | {"priority": priority}).status_code == status


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 257}, "max_tokens: 257 is more than the bundle's capacity of 256"),
        ({"max_tokens": 0}, "max_tokens: 0 is not allowed"),
        ({"max_body": 0}, "max_body: 0 is not allowed"),
        ({"max_priority": 101}, "max_priority: 101 is not allowed"),
        ({"max_choices": 0}, "max_choices: 0 is not allowed"),
        ({"timeout": -1.0}, "timeout: -1.0 is not allowed"),
        ({"model_name": ""}, "model_name: '' is not allowed"),
        ({"model_name": "a\nb"}, "model_name: "),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str, engine: AsyncC2CEngine):
    with pytest.raises(UsageError, match=message):
        create_app(engine, ServerSettings(**settings))


def test_the_servers_timeout_ends_what_takes_longer(engine: AsyncC2CEngine):
    with DecodeGate(engine), served_here(engine, model_name="m", timeout=0.02) as served, served.http() as client:
        long = CHAT | {"max_tokens": None, "ignore_eos": True, "n": 8}
        assert refused(client.post(CHATS, json=long), 408)["code"] == "deadline_exceeded"
        events = client.post(CHATS, json=long | {"stream": True}).text
        wait_until(lambda: engine.num_active == engine.num_waiting == 0)
    # Before the first token it is a status, behind it the last event.
    last = events.rstrip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "deadline_exceeded"


# --- queues ---


@pytest.fixture
def crowded(recorded_bundle: Callable[[str], Path]) -> Iterator[tuple[Served, AsyncC2CEngine]]:
    """Two slots, and room for four that wait."""
    metrics = ServerMetrics()
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle(PAIR),
        num_slots=2,
        num_threads=1,
        allow_unchecked=True,
        options=SchedulerOptions(max_waiting=4),
        observer=metrics,
    )
    try:
        with served_here(engine, metrics, model_name="m", max_waiting=4) as served:
            yield served, engine
    finally:
        engine.close_and_wait(drain_seconds=0)


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number} times {number + 1}?"}]


async def ask_all(served: Served, numbers: range) -> list[str | RateLimitError]:
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=60) as client:

        async def ask(number: int) -> str | RateLimitError:
            options: Any = {"model": "m", "messages": question(number), "max_tokens": 40, "temperature": 0}
            try:
                if number % 2:
                    out = await client.chat.completions.create(**options, extra_body={"ignore_eos": True})
                    return out.choices[0].message.content or ""
                stream = await client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            except RateLimitError as error:
                return error

        return await asyncio.gather(*map(ask, numbers))


def test_tenfold_overload_is_turned_away_and_all_others_are_answered_right(
    crowded: tuple[Served, AsyncC2CEngine], recorded_pipeline: Callable[[str], C2CPipeline]
):
    served, engine = crowded
    with ThreadPoolExecutor(1) as threads, DecodeGate(engine) as gate:
        asking = threads.submit(asyncio.run, ask_all(served, range(60)))
        # Two are served and four wait.
        wait_until(lambda: served.metric("c2c_refused_total") == 54)
        gate.open()
        found: list[str | RateLimitError] = asking.result()
    turned_away = [out for out in found if isinstance(out, RateLimitError)]
    assert len(turned_away) == 54
    for error in turned_away:
        assert int(error.response.headers["retry-after"]) >= 1
        refused(error.response, 429)
        assert (error.type, error.code) == ("rate_limit_error", "queue_full")
    pipeline = recorded_pipeline(PAIR)
    for number, out in enumerate(found):
        if isinstance(out, str):
            assert out == pipeline.generate(question(number), max_new_tokens=40, ignore_eos=True).text
    assert served.metric("c2c_refused_total") == 54
    assert served.metric("c2c_requests_total", outcome="length") == 6
    assert engine.num_active == engine.num_waiting == 0


def test_one_refused_answer_of_several_refuses_all(crowded: tuple[Served, AsyncC2CEngine]):
    served, engine = crowded
    body = CHAT | {"n": 30, "max_tokens": None, "ignore_eos": True}
    with served.http() as client:
        response = client.post(CHATS, json=body)
    refused(response, 429)
    wait_until(lambda: engine.num_active == engine.num_waiting == 0)
    counted = served.metrics()
    assert counted["c2c_refused_total"] == 30
    # None was begun, and none ended early.
    assert not any(counted[f'c2c_requests_total{{outcome="{outcome}"}}'] for outcome in ("length", "aborted"))


def test_several_answers_are_begun_together_or_not_at_all(
    crowded: tuple[Served, AsyncC2CEngine], monkeypatch: pytest.MonkeyPatch
):
    served, engine = crowded
    assert served.app is not None
    release = threading.Event()
    # The engine stands still at the first token that follows another one.
    monkeypatch.setattr(served.app.state.service.metrics, "next_token", lambda _: release.wait(20))
    long: dict[str, Any] = CHAT | {"max_tokens": None, "ignore_eos": True, "stream": True}
    with served.http() as client, client.stream("POST", CHATS, json=long | {"n": 4}) as running:
        lines = running.iter_lines()  # kept, as the client leaves when it is closed
        next(lines)
        wait_until(lambda: engine.num_requests == 4)
        # Of two slots and four that may wait, two are left.
        error = refused(client.post(CHATS, json=CHAT | {"n": 3}), 429)
        assert error["message"].startswith("3 answers are asked for, and 2 more may wait or be served now")
        assert engine.num_requests == 4
        release.set()
        assert client.post(CHATS, json=CHAT | {"n": 2}).status_code == 200


def test_without_a_prefix_cache_nothing_tells_what_others_asked(recorded_bundle: Callable[[str], Path]):
    options = SchedulerOptions(prefix_cache_bytes=0)
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle(PAIR), num_slots=2, num_threads=1, allow_unchecked=True, options=options
    )
    try:
        with served_here(engine, model_name="m") as served, served.http() as client:
            body = CHAT | {"messages": [{"role": "user", "content": "a secret of one tenant's, long enough"}], "n": 2}
            for _ in range(3):
                out = client.post(CHATS, json=body).json()
                assert out["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
                assert out["c2c"]["reused_tokens"] == 0
    finally:
        engine.close_and_wait(drain_seconds=0)


def test_a_key_is_the_client_that_takes_turns_else_the_user_is(engine: AsyncC2CEngine, monkeypatch: pytest.MonkeyPatch):
    clients: list[str] = []
    generate = engine.generate

    async def noting(request: Any) -> Any:
        clients.append(request.client)
        return await generate(request)

    monkeypatch.setattr(engine, "generate", noting)
    for keys in ((), KEYS):
        with served_here(engine, model_name="m", api_keys=keys) as served:
            for user in ("ann", "bob"):
                headers = {"Authorization": f"Bearer {KEYS[1]}"}
                httpx2.post(f"{served.url}{CHATS}", json=CHAT | {"user": user}, headers=headers).raise_for_status()
    assert clients == ["ann", "bob", "key 1", "key 1"]
