"""Who can use the page, and on what: by keyboard, by screen reader, in both colour schemes, on any width."""

from collections.abc import Callable

import pytest
from chat_page import ChatPage
from page_checks import clipped_controls, low_contrasts, overflow, structure_faults
from playwright.sync_api import expect
from served import Served

pytestmark = pytest.mark.xdist_group("two_sharers_parallel")

OpenPage = Callable[..., ChatPage]
LONG_WORD = "Donaudampfschifffahrtsgesellschaft" * 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_stand_out(open_page: OpenPage, scheme: str) -> None:
    chat = open_page(color_scheme=scheme)
    chat.visit.expected_statuses = {400}
    chat.wait_until_ready()
    assert low_contrasts(chat.page) == []
    chat.page.locator("summary", has_text="Gates as a table").first.click()
    chat.page.get_by_role("switch", name="sharer1").uncheck()
    chat.ask("Name a river.", 12)
    chat.question.fill("And a lake?")
    assert low_contrasts(chat.page) == []
    chat.ask("Which country is Lyon in? " * 40, 5)
    expect(chat.note("c2c")).to_have_class("note error")
    chat.page.evaluate("document.getElementById('key-form').hidden = false")
    assert low_contrasts(chat.page) == []


def test_controls_have_names_and_headings_their_order(chat: ChatPage) -> None:
    assert structure_faults(chat.page) == []
    chat.page.locator("summary", has_text="Gates as a table").first.click()
    chat.ask("Name a river.", 5)
    chat.ask("And a lake?", 5)
    assert structure_faults(chat.page) == []


def test_everything_can_be_done_by_keyboard_alone(
    open_page: OpenPage, server: Served, pace: Callable[[float], None]
) -> None:
    chat = open_page()
    chat.wait_until_ready()
    page = chat.page
    reachable = page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, input, textarea, summary")]
            .filter((each) => each.checkVisibility() && !each.disabled)
            .map((each) => each.id || each.textContent.trim())"""
    )
    visited = []
    for _ in range(len(reachable)):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """() => {
                const style = getComputedStyle(document.activeElement);
                return {
                    name: document.activeElement.id || document.activeElement.textContent.trim(),
                    outline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
                    top: document.activeElement.getBoundingClientRect().top,
                };
            }"""
        )
        visited.append(focus["name"])
        assert focus["outline"], f"the focus on {focus['name']} cannot be seen"
        assert focus["top"] >= 0
    assert visited == reachable

    # The link at the top leads to the question at once.
    page.locator("body").evaluate("() => document.activeElement.blur()")
    page.get_by_role("link", name="Skip to the question").focus()
    page.keyboard.press("Enter")
    expect(chat.question).to_be_focused()
    page.keyboard.type("Name a river.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("And a lake.")
    expect(chat.question).to_have_value("Name a river.\nAnd a lake.")
    assert chat.sent == []
    pace(0.02)
    page.keyboard.press("Enter")
    chat.wait_for_text()
    assert chat.sent[0]["messages"][-1]["content"] == "Name a river.\nAnd a lake."
    # Tab goes on to the buttons; the focus of one that goes is not lost.
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(chat.stop).to_be_focused()
    page.keyboard.press("Space")
    expect(chat.note("c2c")).to_have_text("Stopped by you.")
    expect(chat.question).to_be_focused()
    # A sharer is switched by the space bar.
    switch = page.get_by_role("switch", name="sharer1")
    switch.focus()
    page.keyboard.press("Space")
    expect(switch).not_to_be_checked()


def test_enter_does_not_send_while_a_character_is_composed(chat: ChatPage) -> None:
    chat.question.fill("かわ")
    chat.question.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True})
    expect(chat.page.locator(".turn")).to_have_count(0)
    chat.question.press("Enter")
    expect(chat.page.locator(".turn")).to_have_count(1)
    chat.wait_for_answers()


def test_a_screen_reader_hears_whole_answers_once(chat: ChatPage, pace: Callable[[float], None]) -> None:
    chat.page.evaluate(
        """() => {
            window.heard = [];
            const live = document.querySelectorAll("[aria-live], [role=status], [role=log], [role=alert]");
            for (const region of live) {
                new MutationObserver((changes) => {
                    const added = changes.flatMap((change) => [...change.addedNodes]);
                    window.heard.push(...added.map((node) => node.textContent));
                }).observe(region, { subtree: true, childList: true, characterData: true });
            }
        }"""
    )
    pace(0.005)
    chat.ask("Name a river.", 30)
    heard = chat.page.evaluate("window.heard")
    assert heard[0] == "Asked. Receiver alone and C2C will be read out when complete."
    assert sorted(heard[1:]) == sorted(
        [f"Receiver alone answered: {chat.text('receiver')}", f"C2C answered: {chat.text('c2c')}"]
    )
    assert chat.page.locator("#announcer").get_attribute("aria-live") == "polite"
    # Answers as they grow lie outside all live regions.
    assert chat.page.locator("[aria-live] .answer, [role=log] .answer, [role=status] .answer").count() == 0


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1280, 1920])
def test_no_width_scrolls_sideways(open_page: OpenPage, width: int) -> None:
    chat = open_page(viewport={"width": width, "height": 800})
    chat.visit.expected_statuses = {400}
    chat.wait_until_ready()
    assert (overflow(chat.page), clipped_controls(chat.page)) == (0, [])
    chat.ask(f"Name a river. {LONG_WORD}", 20)
    chat.page.evaluate("document.getElementById('panel').open = true")
    chat.page.locator("summary", has_text="Gates as a table").first.click()
    assert (overflow(chat.page), clipped_controls(chat.page)) == (0, [])
    chat.ask("Which country is Lyon in? " * 40, 5)
    chat.page.evaluate("document.getElementById('key-form').hidden = false")
    assert (overflow(chat.page), clipped_controls(chat.page)) == (0, [])


@pytest.mark.parametrize(("width", "beside"), [(390, False), (1280, True)])
def test_answers_stand_beside_each_other_or_on_a_phone_below(open_page: OpenPage, width: int, beside: bool) -> None:
    chat = open_page(viewport={"width": width, "height": 800})
    chat.wait_until_ready()
    chat.ask("Name a river.", 12)
    first, second = (chat.answer(side).bounding_box() for side in ("receiver", "c2c"))
    assert first is not None
    assert second is not None
    if beside:
        assert first["y"] == second["y"]
        assert first["x"] + first["width"] < second["x"]
        timelines = [chat.answer(side).locator(".timeline").bounding_box() for side in ("receiver", "c2c")]
        assert timelines[0] is not None
        assert timelines[1] is not None
        assert timelines[0]["y"] == timelines[1]["y"]
    else:
        assert first["x"] == second["x"]
        assert first["y"] + first["height"] < second["y"]


def test_the_question_is_in_view_when_it_was_asked(open_page: OpenPage) -> None:
    chat = open_page(viewport={"width": 390, "height": 700})
    chat.wait_until_ready()
    for number in range(3):
        chat.ask(f"Question {number}?", 30)
        heading = chat.page.get_by_role("heading", name=f"Question {number}?")
        expect(heading).to_be_in_viewport()
        box = heading.bounding_box()
        assert box is not None
        assert box["y"] < 100


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_by_itself_where_that_is_not_wanted(
    open_page: OpenPage, pace: Callable[[float], None], motion: str
) -> None:
    chat = open_page(reduced_motion=motion)
    chat.wait_until_ready()
    pace(0.02)
    chat.send("Name a river.", 60)
    chat.wait_for_text()
    moving = chat.page.evaluate("document.getAnimations().filter((each) => each.playState === 'running').length")
    assert (moving > 0) == (motion == "no-preference")
    chat.page.keyboard.press("Escape")
    chat.wait_for_answers()
