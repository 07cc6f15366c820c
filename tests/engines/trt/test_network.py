"""What TensorRT parses from the recorded pairs' graphs, counted against the manifest, and what is refused and how."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from recorded_pairs import each_pair

from c2c_export.bundle import Bundle, LayerCounts, SharerRecord, read_manifest
from c2c_export.errors import C2CError
from engines.lowering import lower, save_lowered
from engines.model_layers import model_layer
from engines.trt.log import error_log
from engines.trt.network import GraphNames, cache_aliases, check, expected_layers, parse

trt = pytest.importorskip("tensorrt_rtx")

HEADS, ROWS, SIZE = 4, 32, 16


@functools.cache
def tools() -> tuple[Any, Any]:
    """A logger, and a builder that uses it."""
    log = error_log(trt)
    return log, trt.Builder(log)


def parse_file(path: Path) -> Any:
    log, builder = tools()
    return parse(trt, builder, log, path, GraphNames(ir.load(path)))


def lower_to(folder: Path, path: Path, precision: str) -> Path:
    save_lowered(lower(path, "tensorrt-rtx", precision, is_fuser=path.name.startswith("fuser")), folder / path.name)
    return folder / path.name


# Recorded pairs


def caches_read(sharer: SharerRecord) -> set[tuple[int, str]]:
    """The sharer layer and kind that each open gate reads."""
    return {
        (link.sharer_layer, kind)
        for link in sharer.links
        for kind, is_open in (("key", link.key_gate_open), ("value", link.value_gate_open))
        if is_open
    }


def layers_of_a_pair(bundle: Path) -> dict[str, tuple[int, int, int]]:
    """Attentions, cache updates and rotations of every graph, from the layer map alone."""
    manifest = read_manifest(bundle)
    depth = manifest.receiver.num_layers
    expected = {"receiver": (depth, 2 * depth, 2 * depth)}
    for number, sharer in enumerate(manifest.sharers):
        read = caches_read(sharer)
        if not read:
            continue
        top = max(layer for layer, _ in read)
        # Of the highest layer only what is read is left, and only keys are rotated.
        on_top = {kind for layer, kind in read if layer == top}
        expected[f"sharer{number}"] = (top, 2 * top + len(on_top), 2 * top + ("key" in on_top))
        num_open = sum(link.key_gate_open + link.value_gate_open for link in sharer.links)
        expected[f"fuser{number}"] = (0, num_open, 0)
    return expected


@each_pair
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_layer_of_every_graph_is_native(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = recorded_bundle(pair)
    expected = layers_of_a_pair(bundle)
    assert {path.stem for path in (bundle / "graphs").glob("*.onnx")} == expected.keys()
    for name, counts in expected.items():
        path = lower_to(tmp_path, bundle / "graphs" / f"{name}.onnx", precision)
        parsed = parse_file(path)
        found = check(trt, parsed.network, expected_layers(ir.load(path)), path.name)
        assert (found.attention, found.cache_updates, found.rotary) == counts
        assert found.total == parsed.network.num_layers
        aliases = cache_aliases(trt, parsed.network)
        assert len(aliases) == counts[1]
        assert all(source == f"past_{output}" for output, source in aliases.items())


def test_statistics_of_norms_are_computed_in_float32(recorded_bundle: Callable[[str], Path], tmp_path: Path):
    for path in (recorded_bundle("qwen3_from_qwen2") / "graphs").glob("*.onnx"):
        network = parse_file(lower_to(tmp_path, path, "fp16")).network
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        means = [layer for layer in layers if layer.type == trt.LayerType.REDUCE]
        norms = sum(node.op_type == "RMSNormalization" for node in ir.load(path).graph)
        assert len(means) == norms > 0
        assert {layer.get_input(0).dtype for layer in means} == {trt.float32}


def test_nodes_know_their_layer_in_the_model(recorded_bundle: Callable[[str], Path]):
    bundle = Bundle.open(recorded_bundle("qwen3_from_qwen2"))
    nodes = list(ir.load(bundle.file("graphs/receiver.onnx")).graph)
    attentions = [model_layer(node) for node in nodes if node.op_type == "Attention"]
    assert attentions == [f"model.layers.{layer}.self_attn" for layer in range(4)]
    layers = {model_layer(node) for node in nodes if node.op_type == "MatMul"}
    assert {"model.layers.3.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"} <= layers
    fuser = {model_layer(node) for node in ir.load(bundle.file("graphs/fuser0.onnx")).graph}
    assert any(layer.startswith("projectors.0.key.") for layer in fuser)


# Refusals


def attention_graph(
    tmp_path: Path, *, attributes: dict[str, float] | None = None, lengths: bool = False, in_place: bool = True
) -> Path:
    """One attention over a cache, in a layer called model.layers.7.self_attn."""
    half, index = TensorProto.FLOAT16, TensorProto.INT64
    scatter = [
        helper.make_node("TensorScatter", ["past_key.0", "new", "write_index"], ["key.0"], axis=2, mode="linear")
    ]
    if not in_place:
        scatter = [helper.make_node("Mul", ["past_key.0", "two"], ["key.0"])]
    inputs = ["query", "key.0", "key.0", "mask", *(["", "", "kv_length"] if lengths else [])]
    attention = helper.make_node("Attention", inputs, ["y"], name="node_attention_3", scale=0.25, **(attributes or {}))
    attention.metadata_props.add(
        key="pkg.torch.onnx.name_scopes",
        value="['', 'model.model', 'model.model.layers.7', 'model.model.layers.7.self_attn', '_symbolic_2']",
    )
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "query": (half, ["batch", HEADS, "tokens", SIZE]),
        "past_key.0": (half, ["batch", HEADS, ROWS, SIZE]),
        "mask": (TensorProto.BOOL, ["batch", 1, "tokens", ROWS]),
    }
    if in_place:
        shapes |= {"new": (half, ["batch", HEADS, "tokens", SIZE]), "write_index": (index, ["batch"])}
    if lengths:
        shapes["kv_length"] = (index, ["batch"])
    graph = helper.make_graph(
        [*scatter, attention],
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in shapes.items()],
        [
            helper.make_tensor_value_info("y", half, ["batch", HEADS, "tokens", SIZE]),
            helper.make_tensor_value_info("key.0", half, ["batch", HEADS, ROWS, SIZE]),
        ],
        [numpy_helper.from_array(np.array(2, np.float16), "two")],
    )
    path = tmp_path / "receiver.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), path)
    return path


def check_file(path: Path, expected: LayerCounts | None = None) -> LayerCounts:
    network = parse_file(path).network
    return check(trt, network, expected or expected_layers(ir.load(path)), path.name)


def test_a_good_graph_is_not_refused(tmp_path: Path):
    found = check_file(attention_graph(tmp_path))
    assert (found.attention, found.cache_updates, found.rotary) == (1, 1, 0)


@pytest.mark.parametrize("attributes", [{"softcap": 30.0}, {"softmax_precision": 1}])
def test_a_node_that_the_parser_refuses_is_named_with_the_models_layer(attributes: dict[str, float], tmp_path: Path):
    path = attention_graph(tmp_path, attributes=attributes)
    with pytest.raises(C2CError) as error:
        check_file(path)
    message = str(error.value)
    assert message.startswith(
        "receiver.onnx: TensorRT's parser refuses node node_attention_3 (Attention, layer model.layers.7.self_attn): "
    )
    assert "not supported" in message
    assert len(message.splitlines()) == 1


def test_an_input_that_tensorrt_ignores_is_refused_by_name(tmp_path: Path):
    with pytest.raises(C2CError, match=r"TensorRT accepted but ignores the input kv_length;"):
        check_file(attention_graph(tmp_path, lengths=True))


def test_a_cache_that_is_copied_is_refused_by_name(tmp_path: Path):
    with pytest.raises(C2CError, match=r"the output key\.0 is a copy, expected TensorRT to write it into past_key\.0"):
        check_file(attention_graph(tmp_path, in_place=False))


@pytest.mark.parametrize("kind", ["attention", "cache_updates", "rotary"])
def test_an_operator_that_is_not_native_is_refused_with_both_counts(kind: str, tmp_path: Path):
    counts = {"attention": 1, "cache_updates": 1, "rotary": 0, "total": 2}
    expected = LayerCounts(**{**counts, kind: counts[kind] + 2})
    words = kind.replace("_", " ")
    pattern = rf"TensorRT parsed {counts[kind]} native {words} layers, expected {counts[kind] + 2};"
    with pytest.raises(C2CError, match=pattern):
        check_file(attention_graph(tmp_path), expected)


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path: Path):
    good = attention_graph(tmp_path)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(good.read_bytes()[:100])
    log, builder = tools()
    with pytest.raises(C2CError, match=r"broken\.onnx: TensorRT's parser refuses the graph: \w"):
        parse(trt, builder, log, broken, GraphNames(ir.load(good)))


def test_nodes_are_found_in_tensorrts_messages(tmp_path: Path):
    names = GraphNames(ir.load(attention_graph(tmp_path)))
    for message in (
        "node_attention_3_AttentionInput: query number of heads must be divisible",
        "Could not find any implementation for node {ForeignNode[node_attention_3...node_of_y]}.",
        "[ONNX Layer: node_attention_3]",
    ):
        assert names.mentioned(message) == ["node_attention_3"]
    assert names.mentioned("node_attention_31 and node_attention") == []
    described = names.describe("node_attention_3")
    assert described == "node node_attention_3 (Attention, layer model.layers.7.self_attn)"
