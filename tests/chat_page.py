"""The chat page as a user works with it."""

import json
import re
from dataclasses import dataclass
from typing import Any

from chromium import Visit
from playwright.sync_api import Locator, Page, expect

SIDES = ("receiver", "c2c")


@dataclass
class ChatPage:
    """A visited page of a server."""

    visit: Visit

    @property
    def page(self) -> Page:
        return self.visit.page

    @property
    def question(self) -> Locator:
        return self.page.get_by_role("textbox", name=re.compile(r"^Question( for both)?$"))

    @property
    def state(self) -> Locator:
        return self.page.locator("#state")

    @property
    def stop(self) -> Locator:
        return self.page.get_by_role("button", name="Stop")

    def answer(self, side: str, turn: int = -1) -> Locator:
        return self.page.locator(".turn").nth(turn).locator(f".answer.{side}")

    def text(self, side: str, turn: int = -1) -> str:
        return self.answer(side, turn).locator(".text").text_content() or ""

    def note(self, side: str) -> Locator:
        return self.answer(side).locator(".note")

    def wait_until_ready(self) -> None:
        expect(self.state).to_have_text("Ready")

    def send(self, question: str, longest: int | None = None) -> None:
        if longest is not None:
            self.page.evaluate("longest => { document.getElementById('longest').value = longest }", longest)
        self.question.fill(question)
        self.question.press("Enter")

    def wait_for_answers(self) -> None:
        expect(self.page.locator(".answer[aria-busy]")).to_have_count(0)
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()

    def ask(self, question: str, longest: int | None = None) -> None:
        self.send(question, longest)
        self.wait_for_answers()

    def wait_for_text(self, side: str = "c2c") -> None:
        """Until the first piece of an answer is there."""
        expect(self.answer(side).locator(".text")).not_to_be_empty()

    def phases(self, side: str, turn: int = -1) -> dict[str, str]:
        """The timeline's durations by name."""
        rows = self.answer(side, turn).locator(".phase")
        names, times = rows.locator(".name").all_text_contents(), rows.locator(".time").all_text_contents()
        return dict(zip(names, times, strict=True))

    @property
    def sent(self) -> list[dict[str, Any]]:
        """The bodies of all questions, in the order in which they were sent."""
        chats = [each for each in self.visit.requests if each.url.endswith("/v1/chat/completions")]
        return [json.loads(each.post_data or "") for each in chats]

    def sent_to(self, model: str) -> list[dict[str, Any]]:
        """Those for one model."""
        return [body for body in self.sent if body["model"] == model]
