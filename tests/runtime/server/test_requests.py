"""Requests that cannot be served: a clear error in OpenAI's form, which names the field; never a failure of ours."""

import json
import socket
from typing import Any

import pytest
from served import Served, refused

PAIR = "qwen3_from_llama_aligned"
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": PAIR, "messages": MESSAGES, "max_tokens": 2}
COMPLETION = {"model": PAIR, "prompt": "Hi", "max_tokens": 2}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

pytestmark = pytest.mark.xdist_group(PAIR)


def post(server: Served, path: str, body: dict[str, Any]) -> Any:
    with server.http() as client:
        return client.post(path, json=body)


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (CHATS, {"temperature": 2.1}, "temperature", "temperature: 2.1 is not allowed; input should be less than"),
    (CHATS, {"temperature": "1"}, "temperature", "temperature: '1' is not allowed"),
    (CHATS, {"temperature": True}, "temperature", "temperature: True is not allowed"),
    (CHATS, {"temperature": 1e-31}, "temperature", "temperature: 1e-31 is not allowed; expected 0"),
    (CHATS, {"top_p": -0.1}, "top_p", "top_p: -0.1"),
    (CHATS, {"min_p": 1.1}, "min_p", "min_p: 1.1"),
    (CHATS, {"top_k": -1}, "top_k", "top_k: -1"),
    (CHATS, {"repetition_penalty": 1e9}, "repetition_penalty", "repetition_penalty: 1000000000.0"),
    (CHATS, {"n": 0}, "n", "n: 0 is not allowed"),
    (CHATS, {"n": 65}, "n", "n: 65 answers are asked for"),
    (CHATS, {"seed": -1}, "seed", "seed: -1"),
    (CHATS, {"seed": 2**63}, "seed", f"seed: {2**63}"),
    (CHATS, {"max_tokens": 0}, "max_tokens", "max_tokens: 0"),
    (CHATS, {"max_tokens": 1.5}, "max_tokens", "max_tokens: 1.5"),
    (CHATS, {"max_completion_tokens": 3}, "max_tokens", "max_tokens: differs from max_completion_tokens"),
    (CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: 21"),
    (CHATS, {"top_logprobs": 2}, "top_logprobs", "top_logprobs: only allowed when logprobs is true"),
    (CHATS, {"logprobs": 2}, "logprobs", "logprobs: 2 is not allowed"),
    (CHATS, {"stop": [""]}, "stop[0]", "stop[0]: '' is not allowed"),
    (CHATS, {"stop": 5}, "stop", "stop: 5"),
    (CHATS, {"stop": ["x"] * 17}, "stop", "stop: "),
    (CHATS, {"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
    (CHATS, {"stream": "yes"}, "stream", "stream: 'yes'"),
    (CHATS, {"priority": 101}, "priority", "priority: 101"),
    (CHATS, {"deadline": 0}, "deadline", "deadline: 0"),
    (CHATS, {"sharers": [1]}, "sharers", "sharers: there is no sharer 1; this bundle has sharers 0 to 0"),
    (CHATS, {"sharers": "0"}, "sharers", "sharers: '0'"),
    (CHATS, {"model": f"{PAIR}-receiver", "fuse": True}, "fuse", "uses no sharers"),
    (CHATS, {"model": f"{PAIR}-receiver", "sharers": [0]}, "sharers", "uses no sharers"),
    (CHATS, {"model": 3}, "model", "model: 3"),
    (CHATS, {"messages": []}, "messages", "messages: "),
    (CHATS, {"messages": "Hi"}, "messages", "messages: 'Hi'"),
    (CHATS, {"messages": [{"role": "user", "content": " "}]}, "messages", "the prompt is empty"),
    (CHATS, {"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
    (CHATS, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "messages[0].content: null"),
    (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "messages[0].role: 'tool'"),
    (CHATS, {"messages": [{**MESSAGES[0], "x": 1}]}, "messages[0].x", "there is no such field"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "prompt: it has no tokens"),
    (COMPLETIONS, {"prompt": []}, "prompt", "prompt: "),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]", "prompt[0]: "),
    (COMPLETIONS, {"prompt": ["x", 1]}, "prompt[1]", "prompt[1]: 1"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt[1]", "prompt[1]: 'x'"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt[0]", "prompt[0]: -1"),
    (COMPLETIONS, {"prompt": [2**31]}, "prompt[0]", f"prompt[0]: {2**31}"),
    (COMPLETIONS, {"prompt": [10**6]}, "prompt", "token 0 of the prompt is 1000000"),
    (COMPLETIONS, {"prompt": [[1]] * 33, "n": 2}, "n", "n: 66 answers are asked for (33 prompts, 2 to each)"),
    (COMPLETIONS, {"logprobs": True}, "logprobs", "logprobs: True"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs", "logprobs: 21"),
]


@pytest.mark.parametrize(("path", "fields", "param", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named(path: str, fields: dict[str, Any], param: str, message: str, server: Served):
    body = (CHAT if path == CHATS else COMPLETION) | fields
    error = refused(post(server, path, body), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


UNSERVED: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    (CHATS, {"tool_choice": "required"}),
    (CHATS, {"response_format": {"type": "json_object"}}),
    (CHATS, {"logit_bias": {"5": 1}}),
    (CHATS, {"presence_penalty": 0.5}),
    (CHATS, {"frequency_penalty": -0.5}),
    (CHATS, {"modalities": ["audio"]}),
    (COMPLETIONS, {"echo": True}),
    (COMPLETIONS, {"best_of": 2}),
    (COMPLETIONS, {"suffix": "x"}),
    (COMPLETIONS, {"logit_bias": {"5": 1}}),
    (COMPLETIONS, {"presence_penalty": 1}),
]


@pytest.mark.parametrize(("path", "fields"), UNSERVED, ids=str)
def test_what_openai_has_and_we_do_not_is_refused_not_ignored(path: str, fields: dict[str, Any], server: Served):
    [name] = fields
    error = refused(post(server, path, (CHAT if path == CHATS else COMPLETION) | fields), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}),
    (CHATS, {"response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}),
    (CHATS, {"n": None, "stream": None, "stop": None, "seed": None, "temperature": None, "user": "me", "tools": None}),
    (CHATS, {"messages": [{**MESSAGES[0], "name": None, "tool_calls": None}]}),
    (COMPLETIONS, {"echo": False, "best_of": 1, "suffix": None, "logit_bias": None, "user": "me"}),
]


@pytest.mark.parametrize(("path", "fields"), NEUTRAL, ids=str)
def test_values_that_ask_for_nothing_are_taken(path: str, fields: dict[str, Any], server: Served):
    assert post(server, path, (CHAT if path == CHATS else COMPLETION) | fields).status_code == 200


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_of_a_message_that_are_no_text_are_refused_as_unsupported(kind: str, server: Served):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "https://example.com/x.png"}}]
    error = refused(post(server, CHATS, CHAT | {"messages": [{"role": "user", "content": parts}]}), 400)
    assert (error["param"], error["code"]) == (f"messages[0].content[1].{kind}", "unsupported_parameter")
    assert "not served here" in error["message"]


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS])
def test_a_field_that_nobody_knows_is_refused(path: str, server: Served):
    error = refused(post(server, path, (CHAT if path == CHATS else COMPLETION) | {"temprature": 1}), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


BODIES: list[tuple[bytes, str]] = [
    (b"", "the body is empty"),
    (b"{", "the body is not valid JSON: Expecting property name"),
    (b'{"model": "x",}', "the body is not valid JSON"),
    (b"[]", "the body is no JSON object"),
    (b"null", "JSON object"),
    (b"7", "the body is no JSON object"),
    (b'{"model": "\xff"}', "the body cannot be read: it is not UTF-8 at byte 11; expected JSON in UTF-8"),
    (b"[" * 100_000, "the body cannot be read: it is nested too deeply"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "the body cannot be read: it has a whole number of more than 4300 digits"),
    (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "not valid Unicode"),
    (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "\\ud800": 1}', "there is no such field"),
    (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature: nan"),
    (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "deadline": Infinity}', "deadline: inf"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=lambda value: str(value)[:30])
def test_a_body_that_is_no_request_is_refused(body: bytes, message: str, server: Served):
    with server.http() as client:
        response = client.post(CHATS, content=body, headers={"Content-Type": "application/json"})
    assert message in refused(response, 400)["message"]


def test_a_body_of_another_type_is_refused(server: Served):
    with server.http() as client:
        response = client.post(CHATS, content=json.dumps(CHAT), headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in refused(response, 400)["message"]


def test_an_unknown_model_is_not_found(server: Served):
    error = refused(post(server, CHATS, CHAT | {"model": "gpt-4o"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert f"this server has {PAIR} and {PAIR}-receiver" in error["message"]


def test_an_overlong_prompt_is_refused_by_its_length(server: Served):
    for messages in ([{"role": "user", "content": "word " * 300}], [{"role": "user", "content": "word " * 3000}]):
        body = CHAT | {"messages": messages}
        error = refused(post(server, CHATS, body), 400)
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        assert "this bundle's capacity is 256" in error["message"]
    assert post(server, CHATS, CHAT | {"messages": MESSAGES * 257}).json()["error"]["code"] == "context_length_exceeded"
    error = refused(post(server, COMPLETIONS, COMPLETION | {"prompt": "x" * 10_000}), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = refused(post(server, COMPLETIONS, COMPLETION | {"prompt": [5] * 300}), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = refused(post(server, COMPLETIONS, COMPLETION | {"prompt": [5] * 250, "max_tokens": 100}), 400)
    assert "250 prompt tokens and max_tokens=100 exceed the bundle's capacity of 256" in error["message"]
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    for field in ("max_tokens", "max_completion_tokens"):
        error = refused(post(server, CHATS, {"model": PAIR, "messages": MESSAGES, field: 5000}), 400)
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    error = refused(post(server, CHATS, body | {"stream": True}), 400)
    assert error["code"] == "context_length_exceeded"


def test_a_deadline_that_passes_is_a_timeout(server: Served):
    before = server.metric("c2c_requests_total", outcome="deadline")
    body = CHAT | {"max_tokens": 200, "ignore_eos": True, "deadline": 0.001}
    error = refused(post(server, CHATS, body), 408)
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert server.metric("c2c_requests_total", outcome="deadline") == before + 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/nope", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", CHATS, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/", 405),
        ("PATCH", "/health", 405),
    ],
)
def test_unknown_paths_and_methods_are_errors_in_the_same_form(method: str, path: str, status: int, server: Served):
    with server.http() as client:
        response = client.request(method, path)
    refused(response, status)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/"])
def test_head_is_answered_as_get_but_without_a_body(path: str, server: Served):
    with server.http() as client:
        head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://a.proxy:80/health", 200),
        ("HTTPS://a.proxy/ready?x=1", 200),
        ("http://a.proxy", 200),
        ("http://a/x", 404),
    ],
)
def test_a_target_may_be_absolute(target: str, status: int, server: Served):
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: a.proxy\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


def test_bytes_that_are_no_http_close_the_connection_and_nothing_else(server: Served):
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01\x00\xff not http\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        assert connection.recv(4096) == b""
    with server.http() as client:
        assert client.get("/health").json() == {"status": "ok"}


def test_the_request_id_is_the_clients_if_it_can_be_one(server: Served):
    with server.http() as client:
        assert client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for bad in ("two words", "x" * 129, "ä", '"{}'):
            given = client.get("/health", headers={"X-Request-Id": bad.encode()}).headers["x-request-id"]
            assert len(given) == 32
            assert given != bad
