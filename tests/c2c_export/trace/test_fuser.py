"""The traced fuser against the formulas of the paper, written out in plain torch, over random caches and row tables."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import run_graph

from c2c_export.checkpoint import FuserCheckpoint, ProjectorLink
from c2c_export.passes import FUSER_PASSES, apply_passes
from c2c_export.projector import ProjectorWeights, projector_shapes
from c2c_export.trace.fuser import CacheShape, trace_fuser

CAPACITY = 16
TOLERANCE = 1e-5
# sharer and receiver heads and head sizes, num_layers, and (receiver layer, sharer layer, projector) with open gates
CASES = {
    "three_layers": ((1, 12), (2, 16), 3, [(0, 0, 0), (1, 2, 1)], {}),
    "five_layers_one_source_for_all": ((3, 8), (1, 10), 5, [(0, 1, 0), (5, 1, 2)], {}),
    "shared_projector": ((2, 6), (2, 6), 4, [(1, 0, 7), (3, 2, 7)], {}),
    "mixed_gates": (
        (1, 12),
        (2, 8),
        3,
        [(0, 0, 0), (1, 1, 1), (2, 2, 2)],
        {(0, "key"): 0.0, (1, "value"): -0.5, (2, "key"): -1.0, (2, "value"): 0.0},
    ),
}

Floats = NDArray[np.float32]


def make_fuser(name: str, seed: int = 0) -> FuserCheckpoint:
    """A fuser of random weights; gates that `CASES` does not set are open, at a small positive logit."""
    sharer, receiver, num_layers, links, gates = CASES[name]
    torch.manual_seed(seed)
    dims = {
        "source_num_heads": sharer[0],
        "source_dim": sharer[1],
        "target_num_heads": receiver[0],
        "target_dim": receiver[1],
        "intermediate_dim": 20,
        "hidden_dim": 14,
        "num_layers": num_layers,
    }
    projectors = {}
    for index in {projector for _, _, projector in links}:
        state = {}
        for tensor, shape in projector_shapes(**dims).items():
            side = tensor.partition("_")[0]
            if tensor.endswith("gate_logit"):
                state[tensor] = torch.tensor(gates.get((index, side), 1e-3))
            else:
                state[tensor] = torch.randn(shape) * (0.4 if len(shape) == 2 else 0.5) + ("norm" in tensor)
        projectors[index] = ProjectorWeights(**dims, state=state)
    return FuserCheckpoint(
        folder=Path("fuser"),
        aligned=True,
        alignment_strategy="first",
        fusion_mode=None,
        links=tuple(ProjectorLink(*link) for link in links),
        projectors=projectors,
        files={},
    )


class Traced:
    """A fuser's graph as it was traced and after `FUSER_PASSES`."""

    def __init__(self, name: str, *, separate_unfused: bool) -> None:
        self.fuser = make_fuser(name)
        self.separate_unfused = separate_unfused
        self.sharer, self.receiver = CASES[name][0], CASES[name][1]
        graph = trace_fuser(
            self.fuser,
            CacheShape(*self.sharer),
            CacheShape(*self.receiver),
            CAPACITY,
            separate_unfused=separate_unfused,
        )
        self.traced = ir.to_proto(graph)
        self.counts = apply_passes(graph, FUSER_PASSES)
        self.passed = ir.to_proto(graph)


@functools.cache
def traced_fuser(name: str) -> Traced:
    # one case of each kind of graph has the unfused rows as separate inputs
    return Traced(name, separate_unfused=name in ("five_layers_one_source_for_all", "mixed_gates"))


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest) -> Traced:
    return traced_fuser(request.param)


def correction(weights: ProjectorWeights, side: str, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`gate * weight * proj` for source [N,Hs*Ds] and target [N,Ht*Dt]: [N,Ht,Dt]."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = weights.state.get(f"{side}_{name}.bias")
        return x @ weights.state[f"{side}_{name}.weight"].T + (0 if bias is None else bias)

    def mlp(name: str, x: torch.Tensor, num_blocks: int) -> torch.Tensor:
        for block in range(num_blocks):
            prefix = f"{name}.blocks.{block}"
            scale = torch.sqrt((x * x).mean(dim=1, keepdim=True) + 1e-6)
            inner = linear(f"{prefix}.w1", x / scale * weights.state[f"{side}_{prefix}.norm.weight"])
            x = x + linear(f"{prefix}.w2", inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
        return x

    hidden = mlp("mlp1", linear("in", torch.cat([source, target], dim=1)), 1)
    projection = linear("proj_out", mlp("proj_mlp2", hidden, weights.num_layers - 2))
    weight = 1 / (1 + torch.exp(-linear("scalar_head", mlp("scalar_mlp2", hidden, 1))))
    gate = 1.0 if weights.state[f"{side}_gate_logit"].item() > 0 else 0.0
    heads = projection.reshape(len(source), weights.target_num_heads, weights.target_dim)
    return gate * weight[:, :, None] * heads


def expected_caches(
    traced: Traced, caches: dict[str, Floats], sharer_rows: Sequence[int], receiver_rows: range
) -> dict[str, Floats]:
    """Every receiver cache of a link after the fusion, by name."""
    result = {}
    for link in traced.fuser.links:
        for side in ("key", "value"):
            before = torch.tensor(caches[f"past_{side}.{link.receiver_layer}"])[0]
            current = before[:, receiver_rows.start : receiver_rows.stop]
            unfused = current
            if traced.separate_unfused:
                unfused = torch.tensor(caches[f"unfused_{side}.{link.receiver_layer}"])[0]
            source = torch.tensor(caches[f"sharer_{side}.{link.sharer_layer}"])[0][:, list(sharer_rows)]
            count = len(receiver_rows)
            added = correction(
                traced.fuser.projectors[link.projector],
                side,
                source.transpose(0, 1).reshape(count, -1),
                unfused.transpose(0, 1).reshape(count, -1),
            )
            after = before.clone()
            after[:, receiver_rows.start : receiver_rows.stop] = current + added.transpose(0, 1)
            result[f"{side}.{link.receiver_layer}"] = after[None].numpy()
    return result


def random_caches(traced: Traced, num_rows: int, seed: int) -> dict[str, Floats]:
    """A random cache for every link, whether the graph still reads it or not."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for link in traced.fuser.links:
        for side in ("key", "value"):
            shapes[f"sharer_{side}.{link.sharer_layer}"] = (1, traced.sharer[0], CAPACITY, traced.sharer[1])
            shapes[f"past_{side}.{link.receiver_layer}"] = (1, traced.receiver[0], CAPACITY, traced.receiver[1])
            shapes[f"unfused_{side}.{link.receiver_layer}"] = (1, traced.receiver[0], num_rows, traced.receiver[1])
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def fuse(
    proto: onnx.ModelProto, caches: dict[str, Floats], sharer_rows: Sequence[int], receiver_rows: range
) -> dict[str, Floats]:
    indices = {
        "sharer_rows": np.array(sharer_rows, dtype=np.int64),
        "receiver_rows": np.array(receiver_rows, dtype=np.int64),
        "write_index": np.array([receiver_rows.start], dtype=np.int64),
    }
    return run_graph(proto, {**indices, **caches})


@pytest.mark.parametrize(
    ("sharer_rows", "receiver_rows"),
    [
        (range(5), range(5)),
        ([7], range(3, 4)),
        ([9, 2, 2, 11, 2, 0], range(4, 10)),
        (range(CAPACITY), range(CAPACITY)),
        ([0, 15], range(CAPACITY - 2, CAPACITY)),
    ],
    ids=["first_rows", "one_row", "repeated_rows", "all_rows", "last_rows"],
)
def test_the_fused_caches_are_those_of_the_formulas(
    traced: Traced, sharer_rows: Sequence[int], receiver_rows: range
) -> None:
    caches = random_caches(traced, len(receiver_rows), seed=len(receiver_rows))
    expected = expected_caches(traced, caches, sharer_rows, receiver_rows)
    before_passes = fuse(traced.traced, caches, sharer_rows, receiver_rows)
    after_passes = fuse(traced.passed, caches, sharer_rows, receiver_rows)
    assert before_passes.keys() == expected.keys()
    outside = np.setdiff1d(np.arange(CAPACITY), receiver_rows)
    for name, rows in expected.items():
        # a cache that the passes removed must be one that fusing does not change
        found = [before_passes[name], after_passes.get(name, caches[f"past_{name}"])]
        for cache in found:
            np.testing.assert_allclose(cache, rows, rtol=TOLERANCE, atol=TOLERANCE)
            assert (cache[:, :, outside] == caches[f"past_{name}"][:, :, outside]).all()


def test_only_caches_with_open_gates_are_left_as_inputs_and_outputs(traced: Traced) -> None:
    open_caches = [
        (kind, link)
        for link in traced.fuser.links
        for kind in ("key", "value")
        if traced.fuser.projectors[link.projector].state[f"{kind}_gate_logit"] > 0
    ]
    receiver = [f"{kind}.{link.receiver_layer}" for kind, link in open_caches]
    sharer = {f"sharer_{kind}.{link.sharer_layer}" for kind, link in open_caches}
    unfused = [f"unfused_{name}" for name in receiver] if traced.separate_unfused else []
    assert [value.name for value in traced.passed.graph.output] == receiver
    inputs = [value.name for value in traced.passed.graph.input]
    assert len(inputs) == len(set(inputs))
    assert set(inputs) == {
        "sharer_rows",
        "receiver_rows",
        "write_index",
        *sharer,
        *(f"past_{name}" for name in receiver),
        *unfused,
    }


def test_the_passes_find_every_gate_and_every_norm(traced: Traced) -> None:
    sides = [
        projector.num_layers
        for link in traced.fuser.links
        for kind in ("key", "value")
        if (projector := traced.fuser.projectors[link.projector]).state[f"{kind}_gate_logit"] > 0
    ]
    assert traced.counts["fold_gates"] == 2 * len(traced.fuser.links)
    # mlp1 and the scalar MLP have a block each, the projection num_layers - 2
    assert traced.counts["fuse_rms_norms"] == sum(num_layers - 2 + 2 for num_layers in sides)
    operators = [node.op_type for node in traced.passed.graph.node]
    assert operators.count("RMSNormalization") == traced.counts["fuse_rms_norms"]
    assert operators.count("TensorScatter") == len(sides)
    assert "Greater" not in operators
    assert not [value.name for value in traced.passed.graph.initializer if "gate_logit" in value.name]


def test_the_graph_holds_standard_operators_of_opset_24_only(traced: Traced) -> None:
    onnx.checker.check_model(traced.passed, full_check=True)
    assert [(opset.domain, opset.version) for opset in traced.passed.opset_import if opset.domain == ""] == [("", 24)]
    assert {node.domain for node in traced.passed.graph.node} == {""}
    assert not traced.passed.functions


def test_a_sharer_layer_that_many_receiver_layers_read_is_gathered_once() -> None:
    case = traced_fuser("five_layers_one_source_for_all")
    sources = [
        node.input[0]
        for node in case.passed.graph.node
        if node.op_type == "Gather" and node.input[0].startswith("sharer_")
    ]
    assert sorted(sources) == ["sharer_key.1", "sharer_value.1"]
