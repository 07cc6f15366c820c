"""What the page says when the server cannot answer: keys, a full queue, shutting down, gone; and how it goes on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from chat_page import SIDES, ChatPage
from playwright.sync_api import Browser, expect
from served import Served, served_here, wait_until

from runtime.async_engine import AsyncC2CEngine
from runtime.server.app import begin_closing

pytestmark = pytest.mark.xdist_group("two_sharers_parallel")

OpenPage = Callable[..., ChatPage]
Occupied = Callable[[int], AbstractContextManager[Callable[[], None]]]
KEY = "right-key"


@pytest.fixture(scope="module")
def locked_server(server: Served) -> Iterator[Served]:
    """The same engine behind an API key."""
    assert server.engine is not None
    with served_here(server.engine, api_keys=(KEY,)) as served:
        yield served


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab_alone(
    open_page: OpenPage, locked_server: Served, browser: Browser
) -> None:
    chat = open_page(locked_server)
    chat.visit.expected_statuses = {401}
    page = chat.page
    key = page.get_by_label("API key")
    expect(chat.state).to_have_text("The server asks for an API key.")
    expect(key).to_be_focused()
    expect(key).to_have_attribute("type", "password")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()

    key.fill("wrong-key")
    key.press("Enter")
    expect(chat.state).to_have_text("The server does not know this API key. Enter another one.")
    expect(key).to_be_focused()
    expect(key).to_have_value("")

    key.fill(KEY)
    key.press("Enter")
    chat.wait_until_ready()
    expect(key).to_be_hidden()
    expect(chat.question).to_be_focused()
    chat.ask("Name a river.", 5)
    assert all(chat.text(side) for side in SIDES)

    assert KEY in page.evaluate("Object.values(sessionStorage)")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert not any(KEY in request.url for request in chat.visit.requests)
    page.reload()
    chat.wait_until_ready()
    elsewhere = open_page(locked_server)
    elsewhere.visit.expected_statuses = {401}
    expect(elsewhere.state).to_have_text("The server asks for an API key.")

    page.get_by_role("button", name="Forget the API key").click()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_question_that_lacked_a_key_is_asked_again_with_it(open_page: OpenPage, locked_server: Served) -> None:
    chat = open_page(locked_server)
    chat.visit.expected_statuses = {401}
    key = chat.page.get_by_label("API key")
    key.fill(KEY)
    key.press("Enter")
    chat.wait_until_ready()
    chat.page.get_by_role("button", name="Forget the API key").click()
    chat.ask("Name a river.", 5)
    for side in SIDES:
        expect(chat.note(side)).to_have_text("The server asks for an API key.")
    expect(key).to_be_focused()
    key.fill(KEY)
    key.press("Enter")
    expect(chat.page.locator(".answer .facts:not(:empty)")).to_have_count(2)
    chat.wait_for_answers()
    for side in SIDES:
        assert chat.text(side)
        expect(chat.note(side)).to_be_empty()


def test_a_busy_server_is_asked_again_when_it_said_so(chat: ChatPage, occupied: Occupied) -> None:
    chat.visit.expected_statuses = {429}
    with occupied(4) as release:
        chat.send("Name a river.", 5)
        expect(chat.note("c2c")).to_contain_text("The server is busy: more requests wait than its queue holds.")
        expect(chat.note("c2c")).to_contain_text("Asking again in")
        expect(chat.state).to_contain_text("The server is busy")
        release()
        chat.wait_for_answers()
    for side in SIDES:
        assert chat.text(side)
        expect(chat.note(side)).to_be_empty()
    chat.wait_until_ready()


def test_waiting_for_a_busy_server_can_be_stopped(chat: ChatPage, occupied: Occupied) -> None:
    chat.visit.expected_statuses = {429}
    with occupied(4):
        chat.send("Name a river.", 5)
        expect(chat.note("c2c")).to_contain_text("Asking again in")
        num_sent = len(chat.sent)
        chat.page.keyboard.press("Escape")
        expect(chat.note("c2c")).to_have_text("Stopped by you before it began.")
        chat.wait_for_answers()
        assert len(chat.sent) == num_sent


def test_a_request_that_waits_in_the_queue_is_withdrawn_by_stopping(
    chat: ChatPage, server: Served, occupied: Occupied
) -> None:
    with occupied(2):
        chat.send("Name a river.", 5)
        wait_until(lambda: server.engine is not None and server.engine.num_waiting == 2)
        chat.page.keyboard.press("Escape")
        wait_until(lambda: server.engine is not None and server.engine.num_waiting == 0)
        for side in SIDES:
            expect(chat.note(side)).to_have_text("Stopped by you before it began.")


def test_a_server_that_shuts_down_says_so_and_can_be_asked_again(open_page: OpenPage, server: Served) -> None:
    assert server.engine is not None
    with served_here(server.engine) as served:
        assert served.app is not None
        chat = open_page(served)
        chat.visit.expected_statuses = {503}
        chat.wait_until_ready()
        begin_closing(served.app)
        chat.ask("Name a lake.", 5)
        for side in SIDES:
            expect(chat.note(side)).to_have_text("The server is shutting down and takes no more questions.")
        expect(chat.state).to_have_text("The server is shutting down and takes no more questions.")
        served.app.state.service.closing = False
        chat.answer("c2c").get_by_role("button", name="Ask again").click()
        expect(chat.answer("c2c").locator(".facts")).not_to_be_empty()
        chat.wait_until_ready()
        expect(chat.note("c2c")).to_be_empty()
        expect(chat.note("receiver")).to_have_text("The server is shutting down and takes no more questions.")


def test_a_server_whose_engine_failed_says_so(
    open_page: OpenPage, recorded_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncC2CEngine.from_bundle(
        recorded_bundle("two_sharers_parallel"), num_slots=2, num_threads=1, allow_unchecked=True
    )

    def fail() -> bool:
        raise RuntimeError("the driver is gone")

    said = "The server's engine failed. It answers again once it is started anew."
    with served_here(engine) as served:
        chat = open_page(served)
        chat.visit.expected_statuses = {500, 503}
        chat.wait_until_ready()
        monkeypatch.setattr(engine._scheduler, "step", fail)
        chat.ask("Name a lake.", 5)
        chat.ask("Name a lake.", 5)
        for side in SIDES:
            expect(chat.note(side)).to_have_text(said)
        expect(chat.state).to_have_text(said)


def test_the_state_is_looked_at_while_nothing_is_asked(open_page: OpenPage, server: Served) -> None:
    assert server.engine is not None
    with served_here(server.engine) as served:
        assert served.app is not None
        chat = open_page(served)
        chat.visit.expected_statuses = {503}
        chat.page.clock.install()
        chat.page.reload()
        chat.wait_until_ready()
        begin_closing(served.app)
        chat.page.clock.run_for(10_000)
        expect(chat.state).to_have_text("The server is shutting down and takes no more questions.")
        served.app.state.service.closing = False
        chat.page.clock.run_for(10_000)
        chat.wait_until_ready()


def test_a_server_that_is_gone_is_told_in_a_sentence(open_page: OpenPage, server: Served) -> None:
    assert server.engine is not None
    with served_here(server.engine) as served:
        chat = open_page(served)
        chat.wait_until_ready()
    chat.ask("Name a lake.", 5)
    for side in SIDES:
        expect(chat.note(side)).to_have_text("The server cannot be reached. Is it running?")
    expect(chat.state).to_have_text("The server cannot be reached. Is it running?")
    assert {"ERR_CONNECTION_REFUSED" in text for text in chat.visit.complaints} == {True}
    chat.visit.complaints.clear()


def test_a_connection_that_breaks_leaves_what_came_and_offers_to_ask_again(
    chat: ChatPage, server: Served, pace: Callable[[float], None]
) -> None:
    pace(0.05)
    chat.send("Tell me everything.", 60)
    for side in SIDES:
        chat.wait_for_text(side)
    server.cut_connections()
    chat.wait_for_answers()
    for side in SIDES:
        expect(chat.note(side)).to_have_text("The connection broke before the answer was complete.")
        assert chat.text(side)
    pace(0.0)
    chat.answer("c2c").get_by_role("button", name="Ask again").click()
    expect(chat.answer("c2c").locator(".facts")).to_contain_text("60 tokens")
    chat.wait_for_answers()
    chat.ask("Name a river.", 5)
    # What broke is no part of a conversation; what was asked again is, once.
    said = {body["model"]: [each["content"] for each in body["messages"]] for body in chat.sent[-2:]}
    assert said["two_sharers_parallel-receiver"] == ["Name a river."]
    assert said["two_sharers_parallel"] == ["Tell me everything.", chat.text("c2c", turn=0), "Name a river."]
    assert all("Failed to load resource: net::ERR_" in text for text in chat.visit.complaints)
    chat.visit.complaints.clear()
