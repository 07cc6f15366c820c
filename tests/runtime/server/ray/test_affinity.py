"""All turns of a conversation have one key; conversations that differ have others."""

import asyncio
from typing import Any

import pytest

from runtime import Message, Request
from runtime.server.ray.affinity import SessionIdMiddleware, affinity_key

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
FURTHER = [{"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}]


def key(prompt: Any, **options: Any) -> str:
    return affinity_key(Request(prompt=prompt, **options))


def key_with_header(*headers: tuple[bytes, bytes], **options: Any) -> str:
    """The key inside of an application that was asked with these headers."""
    found = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        found.append(await asyncio.create_task(later()))

    async def later() -> str:
        return key([QUESTION], **options)

    asyncio.run(SessionIdMiddleware(application)({"type": "http", "headers": headers}, None, None))  # type: ignore[arg-type]
    return found[0]


@pytest.mark.parametrize("first", [[QUESTION], [SYSTEM, QUESTION]])
def test_turns_keep_their_conversations_key(first: list[Any]):
    assert key(first) == key([*first, *FURTHER])
    assert key(first) == key([Message(message["role"], message["content"]) for message in first])
    assert key(first, client="key 1") == key([*first, *FURTHER], client="key 1")


@pytest.mark.parametrize("other", [[SYSTEM, QUESTION], FURTHER[1:], [{**QUESTION, "role": "system"}], "What?", [1, 2]])
def test_other_conversations_have_other_keys(other: Any):
    assert key([QUESTION]) != key(other)


def test_clients_that_begin_alike_are_told_apart():
    assert key([QUESTION], client="key 1") != key([QUESTION], client="key 2")


def test_ids_and_texts_are_known_by_how_they_begin():
    ids = list(range(100))
    assert key(ids) == key([*ids, 7]) == key(ids[:64])
    assert key(ids) != key([5, *ids])
    assert key("a" * 300) == key("a" * 300 + "b")
    assert key("a" * 300) != key("b" + "a" * 300)


def test_text_that_no_encoding_takes_has_a_key():
    assert key([{"role": "user", "content": "\ud800"}]) != key([QUESTION])


def test_a_session_id_goes_before_all_else():
    assert key_with_header((b"X-Session-Id", b"7")) == "session 7"
    assert key_with_header((b"x-session-id", b"7"), client="key 1") == "session 7"
    assert key_with_header((b"x-session", b"7")) == key_with_header() == key([QUESTION])
