"""The metrics count what happened, no more and no less."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from decode_gate import DecodeGate
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from served import Served, served_here, wait_until

from runtime.async_engine import AsyncC2CEngine
from runtime.server.metrics import ServerMetrics

PAIR = "qwen3_from_llama_aligned"
CHATS = "/v1/chat/completions"
LONG = " ".join(f"word{number}" for number in range(12))
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"

pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def fresh(recorded_bundle: Callable[[str], Path]) -> Iterator[Served]:
    metrics = ServerMetrics()
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle(PAIR), num_slots=3, num_threads=1, allow_unchecked=True, observer=metrics
    )
    try:
        with served_here(engine, metrics, model_name="m") as served:
            yield served
    finally:
        engine.close_and_wait(drain_seconds=0)


def test_metrics_count_what_was_asked_and_answered(fresh: Served):
    def ask(content: str, **fields: object) -> dict[str, int]:
        body = {"model": "m", "messages": [{"role": "user", "content": content}], "ignore_eos": True, **fields}
        with fresh.http() as client:
            response = client.post(CHATS, json=body)
            response.raise_for_status()
            usage: dict[str, int] = response.json()["usage"]
        return usage

    assert fresh.metric("c2c_slots", state="free") == 3
    usages = [
        ask(LONG, max_tokens=7),
        ask(LONG, max_tokens=9),
        ask(LONG, max_tokens=5, model="m-receiver"),
        ask(LONG, max_tokens=30, stop=[" "]),
    ]
    wait_until(lambda: fresh.metric("c2c_slots", state="free") == 3)
    outcomes = {name: fresh.metric("c2c_requests_total", outcome=name) for name in ("stop", "length", "failed")}
    assert outcomes["stop"] + outcomes["length"] == 4
    assert outcomes["length"] >= 3
    assert outcomes["failed"] == 0
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    generated = sum(usage["completion_tokens"] for usage in usages)
    reused = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)  # type: ignore[index]
    assert fresh.metric("c2c_prompt_tokens_total") == prompt
    assert fresh.metric("c2c_generated_tokens_total") == generated
    assert fresh.metric("c2c_reused_tokens_total") == reused > 0
    assert fresh.metric("c2c_cached_bytes") > 0
    assert fresh.metric("c2c_time_to_first_token_seconds_count") == 4
    assert fresh.metric("c2c_inter_token_seconds_count") == generated - 4
    assert fresh.metric("c2c_queued_seconds_count") == 4
    assert fresh.metric("c2c_receiver_prefill_seconds_count") == 4
    assert 1 <= fresh.metric("c2c_sharer_prefill_seconds_count") <= 3  # not for the receiver alone, nor all reused
    assert 1 <= fresh.metric("c2c_fuse_seconds_count") <= 3
    assert fresh.metric("c2c_refused_total") == 0
    assert fresh.metric("c2c_http_requests_total", path=CHATS, status="200") == 4
    assert fresh.metric("c2c_http_request_seconds_count", path=CHATS) == 4


def test_gauges_are_those_of_the_moment(fresh: Served):
    body = {"model": "m", "messages": [{"role": "user", "content": LONG}], "ignore_eos": True, "n": 24, "stream": True}
    assert fresh.engine is not None

    def of_the_moment() -> tuple[float, float, float]:
        now = fresh.metrics()
        used = now['c2c_slots{state="decoding"}'] + now['c2c_slots{state="prefilling"}']
        return used, now['c2c_slots{state="free"}'], now["c2c_queue_length"]

    # No answer ends, so that there is a moment: answers are planned one by one, and change places when one is done.
    with (
        DecodeGate(fresh.engine),
        fresh.http() as client,
        client.stream("POST", CHATS, json=body) as response,
    ):
        lines = response.iter_lines()  # kept, as the client leaves when it is closed
        next(lines)
        wait_until(lambda: of_the_moment() == (3, 0, 21))
    wait_until(lambda: of_the_moment() == (0, 3, 0))


def test_paths_and_methods_that_clients_make_up_make_no_series(fresh: Served):
    with fresh.http() as client:
        for number in range(5):
            client.get(f"/made/up/{number}")
            client.get(f"/v1/models/made-up-{number}")
        text = client.get("/metrics").text
    assert "made" not in text
    assert fresh.metric("c2c_http_requests_total", path="unknown", status="404") == 5


def test_what_is_refused_before_it_reaches_its_route_counts_there(engine: AsyncC2CEngine):
    with served_here(engine, model_name="m", max_body=100, api_keys=("key",)) as served, served.http() as client:
        assert client.post(CHATS, content=b" " * 101).status_code == 401
        assert client.post(CHATS, content=b" " * 101, headers={"Authorization": "Bearer key"}).status_code == 413
        assert client.get("/v1/models/m").status_code == 401
        assert client.post("/made/up", content=b" " * 101).status_code == 413
        assert served.metric("c2c_http_requests_total", path=CHATS, status="401") == 1
        assert served.metric("c2c_http_requests_total", path=CHATS, status="413") == 1
        assert served.metric("c2c_http_requests_total", path="/v1/models/{model:path}", status="401") == 1
        assert served.metric("c2c_http_requests_total", path="unknown", status="413") == 1


def test_the_documentation_lists_every_metric():
    documented = DOCS.read_text(encoding="utf-8")
    for family in text_string_to_metric_families(generate_latest(ServerMetrics().registry).decode()):
        if family.name.startswith("c2c_") and not family.name.endswith("_created"):
            shown = f"{family.name}_total" if family.type == "counter" else family.name
            assert f"`{shown}`" in documented, shown


def test_an_engine_without_our_observer_still_has_metrics(engine: AsyncC2CEngine):
    with served_here(engine, model_name="m") as served, served.http() as client:
        client.post(CHATS, json={"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
        assert served.metric("c2c_slots", state="free") == 4
        assert served.metric("c2c_http_requests_total", path=CHATS, status="200") == 1
