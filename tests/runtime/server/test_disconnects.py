"""A client that leaves: its request ends and its slot is free, whatever the request was doing."""

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from served import Served, wait_until

from runtime.async_engine import AsyncC2CEngine

PAIR = "qwen3_from_llama_aligned"
LONG: dict[str, Any] = {
    "model": PAIR,
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "ignore_eos": True,
    "n": 16,
}

pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture(autouse=True)
def slowed_down(pace: Callable[[float], None]) -> None:
    """Four answers take seconds on any machine, so that no client leaves too late."""
    pace(0.003)


def connect(server: Served, **fields: Any) -> socket.socket:
    """A connection that has sent a request which takes long: its answers fill four slots four times."""
    content = json.dumps(LONG | fields).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def check_freed(server: Served, engine: AsyncC2CEngine, aborted_before: float, num_aborted: int) -> None:
    wait_until(lambda: engine.num_active == engine.num_waiting == 0)
    wait_until(lambda: server.metric("c2c_requests_total", outcome="aborted") >= aborted_before + num_aborted)
    with server.openai() as client:
        out = client.chat.completions.create(model=PAIR, messages=LONG["messages"], max_tokens=3)
    assert out.usage.completion_tokens <= 3


def test_leaving_in_the_middle_of_a_stream_frees_the_slots(server: Served, engine: AsyncC2CEngine):
    before = server.metric("c2c_requests_total", outcome="aborted")
    with connect(server, stream=True) as connection:
        received = b""
        while b'"content":"' not in received.replace(b'"content":""', b""):
            received += connection.recv(4096)
        wait_until(lambda: engine.num_active == 4)
    check_freed(server, engine, before, 12)


def test_a_connection_that_is_reset_frees_the_slots(server: Served, engine: AsyncC2CEngine):
    before = server.metric("c2c_requests_total", outcome="aborted")
    connection = connect(server, stream=True)
    connection.recv(4096)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close by RST, as a killed client
    connection.close()
    check_freed(server, engine, before, 12)


def test_leaving_before_a_whole_answer_frees_the_slots(server: Served, engine: AsyncC2CEngine):
    before = server.metric("c2c_requests_total", outcome="aborted")
    with connect(server):
        wait_until(lambda: engine.num_active == 4)
    check_freed(server, engine, before, 12)


def test_leaving_while_all_answers_wait_takes_them_out_of_the_queue(server: Served, engine: AsyncC2CEngine):
    before = server.metric("c2c_requests_total", outcome="aborted")
    with connect(server, stream=True) as first:
        wait_until(lambda: engine.num_active == 4)
        with connect(server, stream=True, priority=-5):
            wait_until(lambda: engine.num_waiting > 16)
        wait_until(lambda: server.metric("c2c_requests_total", outcome="aborted") == before + 16)
        first.recv(10)
    check_freed(server, engine, before, 20)


def test_a_client_that_reads_slowly_gets_everything(server: Served, engine: AsyncC2CEngine):
    with connect(server, stream=True, n=2, max_tokens=60, logprobs=True, top_logprobs=8) as connection:
        connection.recv(10)
        # It is answered before the client reads on: slots do not wait for readers.
        wait_until(lambda: engine.num_active == engine.num_waiting == 0)
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = connection.recv(4096)
            assert piece
            received += piece
    assert received.count(b'"finish_reason":"length"') == 2
