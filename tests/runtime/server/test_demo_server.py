"""The real demo pair over HTTP: many at once, and every answer the recorded one of the reference."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from decode_gate import DecodeGate
from openai import AsyncOpenAI
from served import Served, served_here, wait_until

from runtime.async_engine import AsyncC2CEngine
from runtime.server.metrics import ServerMetrics

pytestmark = pytest.mark.xdist_group("demo")

RECORDED = json.loads((Path(__file__).parents[2] / "demo_pair" / "expected.json").read_text())
NUM_TOKENS = 32


async def ask_all(served: Served) -> list[str]:
    """The answers; meanwhile some clients leave in the middle of theirs."""
    assert served.engine is not None
    gate = DecodeGate(served.engine)
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def ask(number: int, messages: Any) -> str:
            options: Any = {"model": "demo", "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
            if number % 2:
                out = await client.chat.completions.create(**options)
                return out.choices[0].message.content or ""
            pieces = await client.chat.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in pieces])

        async def ask_and_leave(messages: Any) -> None:
            options: Any = {"model": "demo", "messages": messages, "extra_body": {"ignore_eos": True}}
            async with await client.chat.completions.create(**options, stream=True) as pieces:
                await anext(aiter(pieces))

        def have_left() -> bool:
            return served.metric("c2c_requests_total", outcome="aborted") == 3

        leaving = asyncio.gather(*(ask_and_leave(recorded["messages"]) for recorded in RECORDED[:3]))
        asked = asyncio.gather(*(ask(number, recorded["messages"]) for number, recorded in enumerate(RECORDED)))
        await leaving
        await asyncio.to_thread(wait_until, have_left)
        gate.open()
        return await asked


def test_prompts_asked_at_once_are_answered_as_the_reference_answered_each(demo_bundle: Path):
    metrics = ServerMetrics()
    engine = AsyncC2CEngine.from_bundle(demo_bundle, num_slots=4, num_threads=1, allow_unchecked=True, observer=metrics)
    try:
        with served_here(engine, metrics, model_name="demo") as served:
            assert asyncio.run(ask_all(served)) == [recorded["text"] for recorded in RECORDED]
            wait_until(lambda: engine.num_active == engine.num_waiting == 0)
            outcomes = [served.metric("c2c_requests_total", outcome=name) for name in ("aborted", "failed", "deadline")]
        assert outcomes == [3, 0, 0]
    finally:
        engine.close_and_wait(drain_seconds=0)
