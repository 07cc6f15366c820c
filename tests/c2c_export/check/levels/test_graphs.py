"""The level `graphs` passes good engines, and names graph, layer, K or V, token or slot, and kind of each fault."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import planted_faults as faults
import pytest
from checked_pairs import ENGINES, FindPair
from polygraphy.comparator import RunResults
from recorded_pairs import each_pair

from c2c_export.check.feeds import decoder as decoder_feeds
from c2c_export.check.graph.stored import UnreadableConstant
from c2c_export.check.graph.weights import HeldWeight
from c2c_export.check.graph_cases import graph_cases
from c2c_export.check.levels.graphs import check_graphs

PAIR = "qwen3_from_qwen2"
on_pair = pytest.mark.xdist_group(PAIR)

FAULTS = {
    "new rows swapped": ("receiver", faults.swap_new_rows(1), 1, "key", "the two are swapped"),
    "new rows of a sharer swapped": ("sharer0", faults.swap_new_rows(0), 0, "key", "the two are swapped"),
    "correction removed": ("fuser0", faults.close_gate("key.2"), 2, "key", "Nothing is added.*a gate closed"),
    "layer map shifted": ("fuser0", faults.shift_layer_map, 0, "key", "cache 1 layer above: a shifted layer map"),
    "rotary base": ("receiver", faults.change_rotary_base(9000.0), 0, "key", "except at position 0: the rotary base"),
    "rotary base of a sharer": ("sharer0", faults.change_rotary_base(9000.0), 0, "key", "the rotary base"),
    "mask of one slot": (
        "receiver",
        faults.shift_mask_of_second_request,
        1,
        "key",
        r"^a step of .* slots.*slot 1, row 29 is off.*Only slot 1 .*its newest token is not seen",
    ),
    "mask of one slot of a sharer": (
        "sharer0",
        faults.shift_mask_of_second_request,
        1,
        "key",
        "Only slot 1 .*its newest token is not seen",
    ),
}


@each_pair
@pytest.mark.parametrize("engine", ENGINES)
def test_a_good_engine_passes(pair: str, engine: str, checked_pair: FindPair):
    checked = checked_pair(pair)
    result = check_graphs(checked.context(checked.bundle, engine))
    assert result.passed, result.divergences
    worst = {measurement.name: measurement.value for measurement in result.measurements}
    # Far below the tolerances: these models are small.
    assert worst["receiver other rows changed"] == 0
    exact = "receiver caches" if engine.endswith("fp32") else "receiver caches, activations in float32"
    assert worst[exact] < 1e-4


@on_pair
@pytest.mark.parametrize("engine", ["ort-cpu-fp32", "ort-cpu-int4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, engine: str, checked_pair: FindPair, tmp_path: Path):
    graph, change, layer, kind, message = FAULTS[fault]
    pair = checked_pair(PAIR)
    with pair.copy(tmp_path) as bundle:
        faults.plant(bundle, engine, graph, change)
        result = check_graphs(pair.context(bundle, engine))
    assert not result.passed
    (divergence,) = result.divergences
    assert (divergence.graph, divergence.layer, divergence.kind) == (graph, layer, kind)
    assert divergence.head is not None
    assert divergence.token is not None
    assert re.search(message, divergence.message), divergence.message


@on_pair
def test_an_output_that_is_missing_is_a_closed_gate(checked_pair: FindPair, tmp_path: Path):
    def remove(graph: ir.Graph) -> None:
        graph.outputs.remove(next(value for value in graph.outputs if value.name == "key.2"))

    pair = checked_pair(PAIR)
    with pair.copy(tmp_path) as bundle:
        faults.plant(bundle, "ort-cpu-int8", "fuser0", remove)
        result = check_graphs(pair.context(bundle, "ort-cpu-int8"))
    (divergence,) = result.divergences
    assert (divergence.graph, divergence.layer, divergence.kind) == ("fuser0", 2, "key")
    assert "no output key.2" in divergence.message
    assert "a gate closed" in divergence.message


@on_pair
def test_results_are_saved_for_polygraphy_to_inspect(checked_pair: FindPair, tmp_path: Path):
    pair = checked_pair(PAIR)
    context = pair.context(pair.bundle, "ort-cpu-fp32")
    context = dataclasses.replace(context, options=dataclasses.replace(context.options, save_results=tmp_path))
    assert check_graphs(context).passed
    for graph in context.record.graphs:
        folder = tmp_path / "ort-cpu-fp32" / graph
        results = RunResults.load(str(folder / "0000.json"))
        assert list(results.keys()) == ["trained", "engine"]
        command = [Path(sys.executable).with_name("polygraphy"), "inspect", "data", folder, "--all"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Run Results (2 runners)" in done.stdout


@on_pair
def test_weights_that_cannot_be_read_are_told(checked_pair: FindPair, monkeypatch: pytest.MonkeyPatch):
    checked = checked_pair(PAIR)
    read = HeldWeight.parameter

    def unreadable(weight: HeldWeight):
        if weight.name == "model.layers.1.mlp.up_proj.weight":
            raise UnreadableConstant("a form that nothing reads")
        return read(weight)

    monkeypatch.setattr(HeldWeight, "parameter", unreadable)
    context = checked.context(checked.bundle, "ort-cpu-fp32")
    messages = {divergence.graph: divergence.message for divergence in check_graphs(context).divergences}
    assert "1 of the graph's weights cannot be read" in messages["receiver"]
    assert "model.layers.1.mlp.up_proj.weight is the first" in messages["receiver"]


@on_pair
def test_no_more_than_one_graph_is_in_memory(checked_pair: FindPair):
    checked = checked_pair(PAIR)
    context = checked.context(checked.bundle, "ort-cpu-fp32")
    engine = context.engine
    planned = engine.plan(context.prompts[0])
    assert "pipeline" not in vars(engine), "planning loads no engine"
    assert engine.prefill(context.prompts[0]).plan.receiver.ids.tolist() == planned.receiver.ids.tolist()
    assert "pipeline" in vars(engine)
    load_graph = engine.load_graph

    def load_alone(name: str):
        assert "pipeline" not in vars(engine)
        return load_graph(name)

    engine.load_graph = load_alone  # type: ignore[method-assign]
    assert check_graphs(context).passed


@on_pair
def test_models_with_large_caches_are_stepped_with_one_slot(checked_pair: FindPair, monkeypatch: pytest.MonkeyPatch):
    checked = checked_pair(PAIR)
    monkeypatch.setattr(decoder_feeds, "_STEP_BYTES", 1)
    case = next(graph_cases(checked.context(checked.bundle, "ort-cpu-fp32")))
    feeds = list(case.feeds())
    assert {len(feed.written) for feed in feeds} == {1}
    assert sum(feed.name.startswith("a step of") for feed in feeds) == 5
