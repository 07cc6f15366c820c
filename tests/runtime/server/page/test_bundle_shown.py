"""What the page shows of the bundle: its models, its engine, and the gates of every sharer by layer."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_page import ChatPage
from playwright.sync_api import expect
from served import Served, served_here

from c2c_export.bundle import Manifest, read_manifest
from runtime.async_engine import AsyncC2CEngine

OpenPage = Callable[..., ChatPage]
FindBundle = Callable[[str], Path]


def check_gates(chat: ChatPage, manifest: Manifest) -> None:
    """Drawing, sentence and table say what the manifest says."""
    cards = chat.page.locator(".sharer")
    expect(cards).to_have_count(len(manifest.sharers))
    for number, sharer in enumerate(manifest.sharers):
        card = cards.nth(number)
        links = sorted(sharer.links, key=lambda link: link.receiver_layer)
        drawn = card.locator("svg .gate").evaluate_all(
            "gates => gates.map((at) => [at.y.baseVal.value, at.x.baseVal.value, at.classList.contains('open')])"
        )
        # The K row is above the V row, and layers go to the right.
        middle = sum(y for y, _, _ in drawn) / len(drawn)
        keys = sorted((x, is_open) for y, x, is_open in drawn if y < middle)
        values = sorted((x, is_open) for y, x, is_open in drawn if y > middle)
        assert [is_open for _, is_open in keys] == [link.key_gate_open for link in links]
        assert [is_open for _, is_open in values] == [link.value_gate_open for link in links]
        assert card.locator("svg .wire").count() == len(links)
        closed = [not (link.key_gate_open or link.value_gate_open) for link in links]
        assert card.locator("svg .wire.closed").count() == sum(closed)

        card.locator("summary").click()
        table = card.locator("tbody tr").evaluate_all(
            "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        state = {True: "open", False: "closed"}
        assert table == [
            [str(link.receiver_layer), str(link.sharer_layer), state[link.key_gate_open], state[link.value_gate_open]]
            for link in links
        ]
        spoken = card.get_by_role("img").get_attribute("aria-label") or ""
        for name, gates in (("K", [x.key_gate_open for x in links]), ("V", [x.value_gate_open for x in links])):
            if all(gates):
                assert f"{name} is open in all {len(gates)} fused layers" in spoken
            elif not any(gates):
                assert f"{name} is closed in all {len(gates)} fused layers" in spoken
            else:
                assert f"{name} is open in {sum(gates)} of {len(gates)} fused layers, closed in " in spoken


@pytest.mark.xdist_group("two_sharers_parallel")
def test_gates_of_two_sharers_are_drawn_as_the_manifest_has_them(chat: ChatPage, server: Served) -> None:
    assert server.engine is not None
    manifest = server.engine.bundle.manifest
    assert len({link.key_gate_open for sharer in manifest.sharers for link in sharer.links}) == 2
    check_gates(chat, manifest)
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("two_sharers_parallel")
    expect(chat.page.locator("#models")).to_have_text("receiver receives from sharer1 and sharer2")
    expect(chat.page.locator("#server")).to_contain_text("ort-cpu, fp32")
    expect(chat.page.locator("#server")).to_contain_text("256 tokens")


@pytest.mark.xdist_group("gates_closed")
def test_gates_that_are_all_closed_are_drawn_so(open_page: OpenPage, recorded_bundle: FindBundle) -> None:
    bundle = recorded_bundle("gates_closed")
    engine = AsyncC2CEngine.from_bundle(bundle, num_slots=2, num_threads=1, allow_unchecked=True)
    try:
        with served_here(engine) as served:
            chat = open_page(served)
            chat.wait_until_ready()
            check_gates(chat, read_manifest(bundle))
            chat.ask("Name a river.", 12)
            assert chat.text("c2c") == chat.text("receiver")
    finally:
        engine.close_and_wait(drain_seconds=0)


@pytest.mark.xdist_group("two_sharers_parallel")
def test_a_bundle_of_one_model_has_one_answer(open_page: OpenPage, tmp_path: Path) -> None:
    from recorded_cases import GOLDEN

    from c2c_export.pair import PairOptions, export_pair

    receiver = str(GOLDEN / "two_sharers_parallel" / "receiver")
    options = PairOptions(receiver=receiver, sharers=[], fusers=[], output=tmp_path / "alone.bundle", max_length=128)
    export_pair(options, lambda _: contextlib.nullcontext())
    engine = AsyncC2CEngine.from_bundle(options.output, num_slots=1, num_threads=1, allow_unchecked=True)
    try:
        with served_here(engine) as served:
            chat = open_page(served)
            chat.wait_until_ready()
            expect(chat.page.locator("#sharers-note")).to_have_text("This bundle holds one model, without sharers.")
            chat.ask("Name a river.", 12)
            expect(chat.page.locator(".answer")).to_have_count(1)
            assert chat.text("receiver")
    finally:
        engine.close_and_wait(drain_seconds=0)
