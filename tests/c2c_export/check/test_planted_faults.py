"""Each planted fault is found by the level that should name it, in each precision, and the finding names it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import planted_faults as faults
import pytest
from checked_pairs import ENGINES, FindPair
from recorded_pairs import each_pair

from c2c_export.check.level import LevelResult
from c2c_export.check.levels.sources import check_sources
from c2c_export.check.levels.weights import check_weights
from c2c_export.check_record import Divergence, Kind

PAIRS = ("qwen3_from_qwen2", "llama_from_gemma3_aligned")
ALIGNED = "llama_from_gemma3_aligned"
on_two_pairs = pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PAIRS]
)
on_aligned_pair = pytest.mark.parametrize("pair", [pytest.param(ALIGNED, marks=pytest.mark.xdist_group(ALIGNED))])


@dataclass(frozen=True)
class GraphFault:
    """A change of one graph, and what must be said of it."""

    change: faults.Change
    graph: str
    message: str
    """A regular expression."""
    layer: int | None = None
    kind: Kind | None = None


# Both pairs have open gates, for keys and for values, between receiver layer 2 and some layer of the sharer.
FAULTS = {
    "new rows swapped": GraphFault(
        faults.swap_new_rows(1), "receiver", "takes its new rows from .*v_proj.*swapped", 1, "key"
    ),
    "projections swapped": GraphFault(
        faults.swap_projections(2),
        "receiver",
        r"self_attn\.k_proj\.weight: .*; it holds model\.layers\.2\.self_attn\.v_proj\.weight instead",
        2,
        "key",
    ),
    "projections of a sharer swapped": GraphFault(
        faults.swap_projections(0), "sharer0", r"holds model\.layers\.0\.self_attn\.k_proj\.weight", 0, "value"
    ),
    "correction removed": GraphFault(
        faults.close_gate("key.2"), "fuser0", "key.2 has no correction added; the gate .* is open", 2, "key"
    ),
    "layer map shifted": GraphFault(
        faults.shift_layer_map, "fuser0", "layer map.*its sharer layer is 1 too high", 0, "key"
    ),
    "rotary base": GraphFault(faults.change_rotary_base(20000.0), "receiver", "those of base 20000, expected", layer=0),
    "rotary base of a sharer": GraphFault(
        faults.change_rotary_base(500.0), "sharer0", "those of base 500, expected 10000", layer=0
    ),
    "last block of keys": GraphFault(
        faults.spoil_last_block("model.layers.3.self_attn.k_proj"),
        "receiver",
        r"layers\.3\.self_attn\.k_proj\.weight: .*the first in row \d+",
        3,
        "key",
    ),
    "last block of an MLP": GraphFault(
        faults.spoil_last_block("model.layers.1.mlp.down_proj"),
        "sharer0",
        r"layers\.1\.mlp\.down_proj\.weight: ",
        layer=1,
    ),
    "last block of a projector": GraphFault(
        faults.spoil_last_block("projectors.2.key.mlp1.0.w2"),
        "fuser0",
        r"^2\.key_mlp1\.blocks\.0\.w2\.weight: ",
        2,
        "key",
    ),
    "norm epsilon": GraphFault(
        faults.enlarge_epsilon("model.layers.1.post_attention_layernorm"),
        "receiver",
        "model.layers.1.post_attention_layernorm: the norm's epsilon is .*, 10 times as large",
        layer=1,
    ),
    "norm epsilon of the last norm": GraphFault(
        faults.enlarge_epsilon("model.norm"), "receiver", "model.norm: the norm's epsilon is .*10 times"
    ),
    "norm epsilon of a projector": GraphFault(
        faults.enlarge_epsilon("projectors.2.key.mlp1.0"), "fuser0", "epsilon is 1e-05, expected 1e-06", 2, "key"
    ),
    "mask of one request": GraphFault(
        faults.shift_mask_of_second_request, "receiver", "the mask of layer 0: it is made of .*1 Sub", layer=0
    ),
}


def names_it(divergence: Divergence, fault: GraphFault) -> bool:
    fields = (divergence.graph, divergence.layer, divergence.kind)
    is_told = re.search(fault.message, divergence.message) is not None
    return fields == (fault.graph, fault.layer, fault.kind) and is_told


def told(result: LevelResult) -> str:
    return "\n".join(f"{d.graph} {d.layer} {d.kind}: {d.message}" for d in result.divergences)


@on_two_pairs
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_graph_is_found_and_named(
    checked_pair: FindPair, tmp_path: Path, pair: str, engine: str, fault: str
) -> None:
    planted, checked = FAULTS[fault], checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        faults.plant(bundle, engine, planted.graph, planted.change)
        result = check_weights(checked.context(bundle, engine))
    assert not result.passed
    assert any(names_it(divergence, planted) for divergence in result.divergences), told(result)


@on_two_pairs
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_zero_point_that_is_one_too_high_is_found(
    checked_pair: FindPair, tmp_path: Path, pair: str, engine: str
) -> None:
    checked = checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        module = "model.layers.2.mlp.down_proj"
        faults.plant(bundle, engine, "receiver", faults.shift_last_zero_point(module))
        result = check_weights(checked.context(bundle, engine))
    (divergence,) = result.divergences
    assert re.match(rf"{module}\.weight: 1 of \d+ blocks of 32 weights .* all of them are the last", divergence.message)


@on_aligned_pair
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fuser_that_reads_the_sharers_values_for_its_keys_is_found(
    checked_pair: FindPair, tmp_path: Path, pair: str, engine: str
) -> None:
    checked = checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        faults.plant(bundle, engine, "fuser0", faults.swap_sharer_caches(1))
        result = check_weights(checked.context(bundle, engine))
    fault = GraphFault(faults.swap_sharer_caches(1), "fuser0", "keys and values are swapped", 0, "key")
    assert any(names_it(divergence, fault) for divergence in result.divergences), told(result)


@on_two_pairs
def test_a_fault_in_a_portable_graph_is_found_whichever_engine_is_checked(
    checked_pair: FindPair, tmp_path: Path, pair: str
) -> None:
    checked = checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        faults.plant_in_portable(bundle, "receiver", faults.enlarge_epsilon("model.norm"))
        for engine in ENGINES:
            result = check_weights(checked.context(bundle, engine))
            (divergence,) = result.divergences
            assert divergence.message.startswith("graphs/receiver.onnx: model.norm: the norm's epsilon")


def _shift_links(fields: dict[str, Any]) -> None:
    for link in fields["sharers"][0]["links"]:
        link["sharer_layer"] += 1


def _open_gate(fields: dict[str, Any]) -> None:
    link = next(link for link in fields["sharers"][0]["links"] if not link["value_gate_open"])
    link["value_gate_open"] = True


def _close_gate(fields: dict[str, Any]) -> None:
    fields["sharers"][0]["links"][2]["key_gate_open"] = False


def _swap_projectors(fields: dict[str, Any]) -> None:
    links = fields["sharers"][0]["links"]
    links[0]["projector"], links[1]["projector"] = links[1]["projector"], links[0]["projector"]


def _other_hash(fields: dict[str, Any]) -> None:
    fields["receiver"]["sources"]["model.safetensors"] = "0" * 64


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


MANIFEST_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "layer map": (_shift_links, "layer map is shifted, every link's sharer layer is one too high"),
    "gate opened": (
        _open_gate,
        r"gate of layer \d's value is open in the manifest; its trained logit is -?[\d.e-]+, so",
    ),
    "gate closed": (_close_gate, r"gate of layer 2's key is closed in the manifest; its trained logit is [\d.]+, so"),
    "projectors": (_swap_projectors, "projector of receiver layer 0 is 1 in the manifest, 0 in the checkpoint"),
    "source file": (_other_hash, "model.safetensors is another file"),
    "stop ids": (_set("stop_ids", to=[7]), r"stop_ids are \[7\] in the manifest"),
    "heads": (_set("receiver", "num_key_value_heads", to=8), "receiver.num_key_value_heads is 8 in the manifest"),
    "window": (_set("sharers", 0, "model", "sliding_window", to=9), "sharers.0.model.sliding_window is 9"),
    "capacity": (_set("max_length", to=128), "past_key.0 has heads, rows and head size"),
    "aligned": (_set("aligned", to=True), "aligned is True in the manifest, the checkpoint was trained with False"),
}


@pytest.mark.parametrize("pair", [pytest.param(PAIRS[0], marks=pytest.mark.xdist_group(PAIRS[0]))])
@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_fault_in_the_manifest_is_found_and_named(
    checked_pair: FindPair, tmp_path: Path, pair: str, fault: str
) -> None:
    change, message = MANIFEST_FAULTS[fault]
    checked = checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        faults.change_manifest(bundle, change)
        result = check_sources(checked.context(bundle, ENGINES[0]))
    assert re.search(message, told(result)), told(result)


def _one_entry(table: np.ndarray) -> np.ndarray:
    table[300] += 1
    return table


@on_aligned_pair
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _one_entry,
            r"1 of \d+ entries are wrong, the first is that of receiver token 300 \('.+'\): it is \d+ \(.+\), ",
        ),
        (
            lambda table: np.roll(table, 1),
            "the first is that of receiver token 0 .*: the whole table is shifted by one",
        ),
    ],
    ids=["one entry", "rolled"],
)
def test_a_wrong_alignment_table_is_found_and_named(
    checked_pair: FindPair, tmp_path: Path, pair: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    checked = checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        faults.change_table(bundle, change)
        result = check_sources(checked.context(bundle, ENGINES[0]))
    (divergence,) = result.divergences
    assert re.search(message, divergence.message), divergence.message


@on_aligned_pair
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tokenizer.json", '"vocab"', '"vocab_"', r"tokenizers/sharer0/tokenizer.json: field model.vocab is missing"),
        ("chat_template.jinja", "{", "Hello {", r"tokenizers/sharer0/chat_template.jinja: line 1 is .Hello"),
    ],
)
def test_a_changed_tokenizer_or_template_is_found(
    checked_pair: FindPair, tmp_path: Path, pair: str, name: str, old: str, new: str, message: str
) -> None:
    checked = checked_pair(pair)
    with checked.copy(tmp_path) as bundle:
        file = bundle / "tokenizers" / "sharer0" / name
        file.write_text(file.read_text().replace(old, new, 1))
        faults.make_hashes_right(bundle)
        result = check_sources(checked.context(bundle, ENGINES[0]))
    assert re.search(message, told(result)), told(result)


@each_pair
@pytest.mark.parametrize("engine", ENGINES)
def test_bundles_without_faults_pass(checked_pair: FindPair, pair: str, engine: str) -> None:
    checked = checked_pair(pair)
    context = checked.context(checked.bundle, engine)
    for check in (check_sources, check_weights):
        result = check(context)
        assert result.passed, told(result)
