"""Aligned pairs with all gates closed: the receiver reads its padded prompt, and no sharer or fuser is computed.

In: recorded aligned pairs (tests/golden/README.md) with every gate logit set to 0.0 or -1.0. Expected: the recorded
`receiver_only_logits`, the reference's for the same padded prompt without fusion. Unaligned pairs are in
tests/test_recorded_cases.py.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from c2c_export.pair import PairOptions, export_pair
from runtime import C2CPipeline

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("llama_from_gemma3_aligned", "qwen3_from_llama_aligned")
CLOSED_LOGITS = (0.0, -1.0)
LOGITS_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class ClosedPair:
    """A recorded pair exported with closed gates, and what was recorded of it."""

    pipe: C2CPipeline
    prompts: list[list[dict[str, str]]]
    recorded: dict[str, np.ndarray[Any, Any]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"closed_{name}")) for name in NAMES],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ClosedPair:
    source, folder = GOLDEN / request.param, tmp_path_factory.mktemp("closed_gates")
    shutil.copytree(source / "fuser", folder / "fuser")
    weights = sorted((folder / "fuser" / "final").glob("projector_*.pt"))
    for index, path in enumerate(weights):
        state = torch.load(path, weights_only=True)
        for kind, side in enumerate(("key", "value")):
            state[f"{side}_gate_logit"] = torch.tensor(CLOSED_LOGITS[(index + kind) % 2])
        torch.save(state, path)
    options = PairOptions(
        receiver=str(source / "receiver"),
        sharers=[str(source / "sharer")],
        fusers=[str(folder / "fuser")],
        output=folder / "bundle",
        max_length=128,
    )
    export_pair(options, lambda _: contextlib.nullcontext())
    cases = json.loads((source / "case.json").read_text())["cases"]
    return ClosedPair(
        C2CPipeline.from_bundle(folder / "bundle", num_threads=1, num_slots=2),
        [case["messages"] for case in cases],
        load_file(source / "expected.safetensors"),
    )


def test_closed_gates_give_the_receivers_logits_on_the_padded_prompt(pair: ClosedPair) -> None:
    assert len(pair.prompts) == 4
    for case, messages in enumerate(pair.prompts):
        real = ~pair.recorded[f"{case}.receiver_padding_mask"][0]
        assert not real.all()
        with pair.pipe.prefill(messages) as session:
            assert session.position_ids.tolist() == np.flatnonzero(real).tolist()
            expected = pair.recorded[f"{case}.receiver_only_logits"][0]
            np.testing.assert_allclose(session.logits, expected, rtol=0, atol=LOGITS_TOLERANCE, err_msg=f"case {case}")


def test_closed_gates_leave_neither_sharer_nor_fuser_in_the_bundle(pair: ClosedPair) -> None:
    bundle = pair.pipe.bundle
    manifest = bundle.manifest
    assert manifest.aligned
    assert [(sharer.sharer_graph, sharer.fuser_graph) for sharer in manifest.sharers] == [(None, None)]
    assert not any(link.key_gate_open or link.value_gate_open for link in manifest.sharers[0].links)
    assert len(manifest.sharers[0].links) == manifest.receiver.num_layers
    assert [set(engine.graphs) for engine in manifest.engines.values()] == [{"receiver"}]
    assert {path.name for path in bundle.root.rglob("*.onnx")} == {"receiver.onnx"}


def test_closed_gates_go_on_alike_after_another_turn(pair: ClosedPair) -> None:
    first, *rest = pair.prompts[2]
    with pair.pipe.prefill([first]) as session, pair.pipe.prefill([first, *rest]) as fresh:
        session.generate(max_new_tokens=5, ignore_eos=True)
        session.append(rest)
        assert session.position_ids.tolist() == fresh.position_ids.tolist()
        np.testing.assert_allclose(session.logits, fresh.logits, rtol=0, atol=LOGITS_TOLERANCE)
        generated = session.generate(max_new_tokens=8, ignore_eos=True)
        assert generated.token_ids == fresh.generate(max_new_tokens=8, ignore_eos=True).token_ids
