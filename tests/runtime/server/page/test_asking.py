"""Questions and answers on the page: against a real server, and what its API says for the same request."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from chat_page import SIDES, ChatPage
from playwright.sync_api import expect
from served import Served, wait_until

from runtime.server.metrics import ServerMetrics

pytestmark = pytest.mark.xdist_group("two_sharers_parallel")

MODELS = {"receiver": "two_sharers_parallel-receiver", "c2c": "two_sharers_parallel"}
LONGEST = 40
Occupied = Callable[[int], AbstractContextManager[Callable[[], None]]]


def api_answer(server: Served, side: str, messages: list[dict[str, str]], longest: int = LONGEST, **extra: Any) -> str:
    """What the API answers, whole and not streamed."""
    completion = server.openai().chat.completions.create(
        model=MODELS[side],
        messages=messages,  # type: ignore[arg-type]  # as dicts
        temperature=0,
        max_tokens=longest,
        extra_body=extra,
    )
    return completion.choices[0].message.content or ""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_both_columns_show_what_the_api_answers(chat: ChatPage, server: Served) -> None:
    chat.ask("Which country is Lyon in?", LONGEST)
    for side in SIDES:
        assert chat.text(side) == api_answer(server, side, [user("Which country is Lyon in?")])
    assert chat.text("receiver") != chat.text("c2c")


def test_answers_stream_into_both_columns_at_the_same_time(chat: ChatPage, pace: Callable[[float], None]) -> None:
    chat.page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const texts = [...document.querySelectorAll(".answer .text")].map((each) => each.textContent.length);
                window.seen.push(texts);
            }).observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    pace(0.03)
    chat.ask("Name three rivers.", LONGEST)
    seen = [texts for texts in chat.page.evaluate("window.seen") if len(texts) == 2]
    complete = [len(chat.page.locator(".answer .text").nth(column).text_content() or "") for column in (0, 1)]
    for column in (0, 1):
        lengths = [texts[column] for texts in seen]
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 5
    assert any(0 < first < complete[0] and 0 < second < complete[1] for first, second in seen)


def test_each_side_goes_on_from_its_own_answers(chat: ChatPage, server: Served) -> None:
    chat.ask("Name a river.", 12)
    chat.ask("And a lake?", 12)
    for side in SIDES:
        first = chat.text(side, turn=0)
        messages = [user("Name a river."), {"role": "assistant", "content": first}, user("And a lake?")]
        assert [body["messages"] for body in chat.sent_to(MODELS[side])] == [[user("Name a river.")], messages]
        assert chat.text(side) == api_answer(server, side, messages, 12)


def test_a_sharer_that_is_switched_off_is_not_asked_for(chat: ChatPage, server: Served) -> None:
    question = "Which country is Lyon in?"
    switches = [chat.page.get_by_role("switch", name=name) for name in ("sharer1", "sharer2")]
    chat.ask(question, LONGEST)
    switches[0].uncheck()
    chat.ask(question, LONGEST)
    assert [body["sharers"] for body in chat.sent_to(MODELS["c2c"])] == [[0, 1], [1]]
    assert not any("sharers" in body or "fuse" in body for body in chat.sent_to(MODELS["receiver"]))
    messages = chat.sent_to(MODELS["c2c"])[1]["messages"]
    assert chat.text("c2c") == api_answer(server, "c2c", messages, sharers=[1])
    assert chat.text("c2c") != api_answer(server, "c2c", messages)
    expect(chat.answer("c2c").get_by_role("heading")).to_contain_text("with sharer2")


def test_without_any_sharer_c2c_answers_as_the_receiver_alone_and_says_so(chat: ChatPage) -> None:
    for name in ("sharer1", "sharer2"):
        chat.page.get_by_role("switch", name=name).uncheck()
    expect(chat.page.locator("#sharers-note")).to_have_text(
        "None is in use, so C2C answers as the receiver alone does."
    )
    chat.ask("Which country is Lyon in?", LONGEST)
    assert chat.text("c2c") == chat.text("receiver")
    expect(chat.answer("c2c").get_by_role("heading")).to_contain_text("with no sharer")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_frees_the_slots_and_keeps_what_came(
    chat: ChatPage, server: Served, metrics: ServerMetrics, pace: Callable[[float], None], way: str
) -> None:
    aborted = server.metric("c2c_requests_total", outcome="aborted")
    pace(0.05)
    chat.send("Tell me everything.", 150)
    for side in SIDES:
        chat.wait_for_text(side)
    assert server.engine is not None
    assert server.engine.num_active == 2
    if way == "button":
        chat.stop.click()
    else:
        chat.page.keyboard.press("Escape")
    # The answers would take more than 15 seconds.
    wait_until(lambda: server.metric("c2c_requests_total", outcome="aborted") == aborted + 2, 10)
    assert server.engine.num_active == 0
    kept = {side: chat.text(side) for side in SIDES}
    for side in SIDES:
        expect(chat.note(side)).to_have_text("Stopped by you.")
    pace(0.0)
    chat.ask("Go on.", 5)
    for side in SIDES:
        assert chat.text(side, turn=0) == kept[side]
        assert chat.sent_to(MODELS[side])[1]["messages"][1] == {"role": "assistant", "content": kept[side]}


def test_a_new_chat_stops_what_runs_and_forgets_what_was_said(
    chat: ChatPage, server: Served, pace: Callable[[float], None]
) -> None:
    chat.ask("Name a river.", 5)
    pace(0.05)
    chat.send("Tell me everything.", 150)
    chat.wait_for_text()
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.page.locator(".turn")).to_have_count(0)
    expect(chat.page.get_by_role("heading", name="One question, two answers")).to_be_visible()
    expect(chat.question).to_be_focused()
    wait_until(lambda: server.engine is not None and server.engine.num_active == 0, 10)
    pace(0.0)
    chat.wait_for_answers()
    chat.ask("Name a lake.", 5)
    for side in SIDES:
        assert chat.sent_to(MODELS[side])[-1]["messages"] == [user("Name a lake.")]


def test_an_answer_that_does_not_fit_whole_takes_the_room_that_is_left(chat: ChatPage) -> None:
    chat.visit.expected_statuses = {400}
    chat.ask("Name a river.", 250)
    for side in SIDES:
        assert [body.get("max_tokens") for body in chat.sent_to(MODELS[side])] == [250, None]
        assert chat.text(side)
        expect(chat.note(side)).to_be_empty()


def test_a_conversation_that_is_too_long_is_told_in_a_sentence(chat: ChatPage) -> None:
    chat.visit.expected_statuses = {400}
    chat.ask("Which country is Lyon in? " * 40, 5)
    for side in SIDES:
        expect(chat.note(side)).to_have_text("The conversation is longer than the models can hold. Start a new chat.")
        assert chat.phases(side) == {}
    chat.ask("Name a river.", 5)
    # The question that was refused is no part of the conversation.
    assert chat.sent_to(MODELS["c2c"])[-1]["messages"] == [user("Name a river.")]


def test_timelines_show_the_times_that_the_server_measured(
    chat: ChatPage, server: Served, occupied: Occupied, pace: Callable[[float], None]
) -> None:
    chat.page.evaluate(
        """() => {
            const ask = window.fetch;
            window.streams = [];
            window.fetch = async (...of) => {
                const response = await ask(...of);
                window.streams.push(response.clone().text());
                return response;
            };
        }"""
    )
    # So slow, and so long in the queue, that no phase but the short ones is lost in rounding.
    pace(0.01)
    with occupied(2) as release:
        chat.send("Which country is Dresden in?", LONGEST)
        engine = server.engine
        assert engine is not None
        wait_until(lambda: engine._scheduler._admission.num_queued == 2)  # planned, too
        time.sleep(0.2)
        release()
        chat.wait_for_answers()
    ends: list[dict[str, Any]] = []
    for stream in chat.page.evaluate("Promise.all(window.streams)"):
        chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        details = next(chunk["c2c"]["timings"] for chunk in chunks if chunk.get("c2c"))
        ends.append({"model": chunks[0]["model"], "usage": chunks[-1]["usage"], **details})
    for side in SIDES:
        (end,) = [each for each in ends if each["model"] == MODELS[side]]
        assert end["queued"] > 0.2
        shown = chat.phases(side)
        spans = {"Queue": "queued", "Sharers": "sharer_prefill", "Receiver": "receiver_prefill", "Fuse": "fuse"}
        spans["Decode"] = "decode"
        for name, key in spans.items():
            assert (name in shown) == (end[key] >= 0.0005), (name, end)
            if name in shown:
                assert seconds_of(shown[name]) == pytest.approx(end[key], abs=0.0051)
        assert seconds_of(shown["First token"]) == pytest.approx(end["queued"] + end["ttft"], abs=0.0051)
        facts = chat.answer(side).locator(".facts").text_content() or ""
        assert f"{end['usage']['completion_tokens']} tokens" in facts
        assert f"prompt of {end['usage']['prompt_tokens']} tokens" in facts
        speed = (end["usage"]["completion_tokens"] - 1) / end["decode"]
        assert f"{speed:.0f} tokens/s" in facts or f"{speed:.1f} tokens/s" in facts


def seconds_of(text: str) -> float:
    number, unit = text.split()
    return float(number) / {"s": 1, "ms": 1000}[unit]


def test_bars_lie_where_their_phases_were(chat: ChatPage) -> None:
    chat.ask("Which country is Turin in?", LONGEST)
    ends = {}
    for side in SIDES:
        track = chat.answer(side).locator(".track").first.bounding_box()
        axis = seconds_of(chat.answer(side).locator(".axis span").last.text_content() or "")
        assert track is not None
        ends[side] = axis
        bars = {}
        for row in chat.answer(side).locator(".phase").all():
            box = row.locator(".bar").bounding_box()
            assert box is not None
            assert track["x"] - 8 <= box["x"] <= box["x"] + box["width"] <= track["x"] + track["width"] + 8
            name = row.locator(".name").text_content() or ""
            bars[name] = ((box["x"] - track["x"]) / track["width"] * axis, box["width"] / track["width"] * axis)
        for name, (_, length) in bars.items():
            if name != "First token" and seconds_of(chat.phases(side)[name]) > axis / 50:
                assert length == pytest.approx(seconds_of(chat.phases(side)[name]), abs=0.002 + axis / 50)
        if side == "c2c" and {"Fuse", "Receiver"} <= bars.keys():
            assert bars["Fuse"][0] >= sum(bars["Receiver"]) - axis / 50
            assert bars["Decode"][0] >= sum(bars["Fuse"]) - axis / 50
    assert ends["receiver"] == ends["c2c"], "bars of both answers can be compared"


def test_what_a_model_or_a_user_writes_is_never_read_as_html(chat: ChatPage) -> None:
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    chat.ask(evil, 5)
    expect(chat.page.locator(".question")).to_have_text(evil)
    assert chat.page.locator(".turn img, .turn script").count() == 0
    assert chat.page.title() == "two_sharers_parallel · c2c-export"
