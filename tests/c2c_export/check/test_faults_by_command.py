"""Every class of planted fault through `c2c-export check`: exit status 1, its name, and a mark in the manifest.

One pair, one level each, the cheapest one that is to name the fault.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import planted_faults as faults
import pytest
from command_line import RunCli
from recorded_cases import GOLDEN

from c2c_export.bundle import read_manifest, write_manifest
from c2c_export.check.report import CheckReport
from runtime import C2CPipeline
from runtime.checked import FailedEngineError

PAIR, ENGINE = "llama_from_gemma3_aligned", "ort-cpu-fp32"
pytestmark = pytest.mark.xdist_group(PAIR)


@dataclass(frozen=True)
class Fault:
    """What is planted, the level that is run, and what it must say."""

    plant: Callable[[Path], None]
    level: str
    graph: str | None
    message: str
    """A regular expression."""


def in_graph(graph: str, change: faults.Change) -> Callable[[Path], None]:
    return lambda bundle: faults.plant(bundle, ENGINE, graph, change)


def in_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda bundle: faults.change_manifest(bundle, change)


def flip_gate(fields: dict[str, Any]) -> None:
    link = fields["sharers"][0]["links"][2]
    link["key_gate_open"] = not link["key_gate_open"]


def shift_map(fields: dict[str, Any]) -> None:
    for link in fields["sharers"][0]["links"]:
        link["sharer_layer"] += 1


def shift_entry(table: np.ndarray) -> np.ndarray:
    table[300] += 1
    return table


FAULTS = {
    "K and V swapped in one layer": Fault(
        in_graph("receiver", faults.swap_new_rows(1)), "weights", "receiver", "takes its new rows from .*swapped"
    ),
    "a gate flipped": Fault(
        in_graph("fuser0", faults.close_gate("key.2")), "weights", "fuser0", "key.2 has no correction added"
    ),
    "a gate flipped in the manifest": Fault(in_manifest(flip_gate), "sources", "fuser0", "gate of layer 2's key is"),
    "a layer map shifted": Fault(
        in_graph("fuser0", faults.shift_layer_map), "weights", "fuser0", "layer map.*1 too high"
    ),
    "a layer map shifted in the manifest": Fault(in_manifest(shift_map), "sources", "fuser0", "layer map is shifted"),
    "a rotary base changed": Fault(
        in_graph("sharer0", faults.change_rotary_base(500.0)), "weights", "sharer0", "those of base 500, expected 10000"
    ),
    "an alignment table off by one entry": Fault(
        lambda bundle: faults.change_table(bundle, shift_entry), "sources", None, "1 of .* entries are wrong.*token 300"
    ),
    "a last block dequantised wrongly": Fault(
        in_graph("receiver", faults.spoil_last_block("model.layers.1.mlp.down_proj")),
        "weights",
        "receiver",
        r"^model\.layers\.1\.mlp\.down_proj\.weight: ",
    ),
    "a norm's epsilon 10x": Fault(
        in_graph("receiver", faults.enlarge_epsilon("model.norm")), "weights", "receiver", "epsilon.*10 times"
    ),
    "a slot's mask shifted": Fault(
        in_graph("receiver", faults.shift_mask_of_second_request),
        "graphs",
        "receiver",
        "Only slot 1 .*its newest token is not seen",
    ),
}


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy with its engine in fp32 alone, that was never checked."""
    copy = tmp_path / "pair.bundle"
    shutil.copytree(recorded_bundle(PAIR), copy)
    manifest = read_manifest(copy)
    for name in manifest.engines.keys() - {ENGINE}:
        manifest = manifest.without_engine(name)
    unchecked = manifest.engines[ENGINE].model_copy(update={"check": None})
    write_manifest(copy, manifest.model_copy(update={"engines": {ENGINE: unchecked}}))
    return copy


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_exits_1_is_named_and_kept_and_the_engine_is_refused(
    name: str, run_cli: RunCli, bundle: Path, tmp_path: Path
):
    fault, report = FAULTS[name], tmp_path / "report.json"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "Name three rivers, one a line."}]}))
    fault.plant(bundle)
    sources = [word for kind in ("receiver", "sharer", "fuser") for word in (f"--{kind}", GOLDEN / PAIR / kind)]
    options = ["--prompts", prompts, "--level", fault.level, "--threads", "1", "--json", report]
    code, out, err = run_cli("check", bundle, *sources, *options)
    assert code == 1, err
    assert "FAILED" in out
    check = read_manifest(bundle).engines[ENGINE].check
    assert check is not None
    assert check == CheckReport.model_validate_json(report.read_bytes()).engines[0].check
    (level,) = check.failed_levels
    assert level.name == fault.level
    named = [d for d in level.divergences if d.graph == fault.graph and re.search(fault.message, d.message)]
    assert named, [d.model_dump(exclude_none=True) for d in level.divergences]
    # and the terminal shows it
    assert named[0].message[:40] in " ".join(out.split())
    with pytest.raises(FailedEngineError, match=f"failed its check at level {fault.level}"):
        C2CPipeline.from_bundle(bundle, num_threads=1)
