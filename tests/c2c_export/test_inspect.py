"""What `inspect` shows of a bundle: models, layer map with open and closed gates, graphs with pass counts, engines."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from c2c_export.bundle import Bundle, write_manifest
from c2c_export.inspect import print_bundle

GOLDEN = Path(__file__).parents[1] / "golden"


def shown(bundle: Bundle, width: int = 300) -> list[list[str]]:
    """The printed lines, each split into the cells of its table."""
    text = io.StringIO()
    print_bundle(bundle, Console(file=text, width=width, color_system=None))
    return [
        [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]
        for line in text.getvalue().splitlines()
    ]


def row(lines: list[list[str]], *start: str) -> list[str]:
    """The one line that starts with these cells."""
    (found,) = [line for line in lines if line[: len(start)] == list(start)]
    return found


@pytest.fixture(scope="module")
def bundle(recorded_bundle: Callable[[str], Path]) -> Bundle:
    return Bundle.open(recorded_bundle("qwen3_from_qwen2"))


def test_models_are_shown_with_what_their_caches_take(bundle: Bundle) -> None:
    lines = shown(bundle)
    receiver, sharer = row(lines, "receiver", "Qwen3ForCausalLM"), row(lines, "sharer 0", "Qwen2ForCausalLM")
    assert receiver[2:7] == ["4", "2 × 16", "512", "none", "model"]
    assert sharer[2:7] == ["3", "1 × 12", "512", "none", "the receiver's"]
    assert receiver[7].endswith("qwen3_from_qwen2/receiver")


def test_the_layer_map_shows_which_gates_are_open(bundle: Bundle) -> None:
    import torch

    lines = shown(bundle)
    fuser = GOLDEN / "qwen3_from_qwen2" / "fuser" / "final"
    layers = json.loads((fuser / "projector_config.json").read_text())["0"]["1"]
    words = {True: "open", False: "closed"}
    num_open = 0
    for receiver_layer, ((sharer_layer, projector),) in layers.items():
        state = torch.load(fuser / f"projector_{projector}.pt", weights_only=True)
        gates = [bool(state[f"{kind}_gate_logit"] > 0) for kind in ("key", "value")]
        num_open += sum(gates)
        expected = [receiver_layer, str(sharer_layer), str(projector), *(words[gate] for gate in gates)]
        assert row(lines, *expected) == expected
    assert 0 < num_open < 8
    assert any(f"{num_open} of 8 gates open" in line[0] for line in lines)


def test_graphs_are_shown_with_their_size_and_pass_counts(bundle: Bundle) -> None:
    lines = shown(bundle)
    graphs = {
        "receiver": bundle.manifest.receiver_graph,
        "sharer 0": bundle.manifest.sharers[0].sharer_graph,
        "fuser 0": bundle.manifest.sharers[0].fuser_graph,
    }
    for name, graph in graphs.items():
        assert graph is not None
        cells = row(lines, name, str(graph.num_nodes))
        assert cells[2] == f"{graph.num_bytes / 1e6:.1f} MB"
        for pass_name, count in graph.passes.items():
            assert f"{pass_name} {count}" in cells[3]
    assert row(lines, "ort-cpu", "fp32")[3] == "not checked"


def test_the_counts_of_a_recorded_pair_are_exact(bundle: Bundle) -> None:
    sharer = bundle.manifest.sharers[0]
    assert sharer.fuser_graph is not None
    receiver = bundle.manifest.receiver_graph.passes
    assert (receiver["fuse_rms_norms"], receiver["fuse_rotary"]) == (4 * 4 + 1, 2 * 4)
    open_sides = sum(link.key_gate_open + link.value_gate_open for link in sharer.links)
    assert sharer.fuser_graph.passes["fold_gates"] == 8
    assert sharer.fuser_graph.passes["fuse_rms_norms"] == 3 * open_sides


def test_a_pair_without_an_open_gate_says_so(recorded_bundle: Callable[[str], Path]) -> None:
    lines = shown(Bundle.open(recorded_bundle("gates_closed")))
    for name in ("sharer 0", "fuser 0"):
        assert "every gate is closed" in row(lines, name, "none")[3]
    assert any("0 of 8 gates open" in line[0] for line in lines)


def test_two_sharers_are_shown_with_their_mode(recorded_bundle: Callable[[str], Path]) -> None:
    lines = shown(Bundle.open(recorded_bundle("two_sharers_parallel")))
    assert any("2 sharer(s), fused in parallel" in line[0] for line in lines)
    for name in ("sharer 0", "sharer 1", "fuser 0", "fuser 1"):
        assert [line for line in lines if line[0].startswith(name)]


def test_sources_are_shown_as_they_are_whatever_characters_they_hold(bundle: Bundle, tmp_path: Path) -> None:
    name = "models/[x] [/bold] é"
    model = bundle.manifest.receiver.model_copy(update={"source": name, "chat_template": f"file {name}"})
    sharer = bundle.manifest.sharers[0].model_copy(update={"fuser_source": name})
    changed = Path(shutil.copytree(bundle.root, tmp_path / "a [red] bundle"))
    write_manifest(changed, bundle.manifest.model_copy(update={"receiver": model, "sharers": (sharer,)}))
    lines = shown(Bundle.open(changed))
    assert row(lines, "receiver", "Qwen3ForCausalLM")[6:] == [f"file {name}", name]
    assert any(f"fuser 0: {name}" in line[0] for line in lines)
    assert str(changed) in lines[0][0]


def test_json_is_the_manifest(bundle: Bundle) -> None:
    command = [sys.executable, "-c", "from c2c_export.cli import main; main()", "inspect", str(bundle.root), "--json"]
    result = subprocess.run(command, cwd=GOLDEN.parents[1], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(result.stdout) == json.loads((bundle.root / "manifest.json").read_text())
