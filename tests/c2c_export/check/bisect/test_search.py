"""Bisecting names the node and the module where an error begins, in decoders and fusers, in every precision."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import planted_faults as faults
import pytest
from checked_pairs import ENGINES, FindPair

from c2c_export.check.bisect.search import bisect
from c2c_export.check.levels.graphs import check_graphs
from c2c_export.check_record import Divergence
from engines.model_layers import model_layer

PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


def norm_epsilon(module: str, epsilon: float) -> faults.Change:
    def change(graph: ir.Graph) -> None:
        (node,) = (n for n in graph if n.op_type == "RMSNormalization" and model_layer(n).startswith(module))
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)

    return change


def attention_scale(layer: int) -> faults.Change:
    def change(graph: ir.Graph) -> None:
        (node,) = (
            n for n in graph if n.op_type in ("Attention", "GroupQueryAttention") and f".{layer}." in model_layer(n)
        )
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.5 * node.attributes.get_float("scale"))

    return change


def doubled_output(module: str) -> faults.Change:
    """What the product with a module's weight gives is doubled, in a node of the same module."""

    def change(graph: ir.Graph) -> None:
        node = faults.product(graph, module)
        two = ir.Value(name="two", const_value=ir.tensor(np.array(2, np.float32), name="two"))
        two.type, two.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.register_initializer(two)
        doubled = ir.node("Mul", [node.outputs[0], two], name="doubled", metadata_props=dict(node.metadata_props))
        doubled.outputs[0].dtype, doubled.outputs[0].shape = ir.DataType.FLOAT, node.outputs[0].shape
        for use in list(node.outputs[0].uses()):
            if use.node is not doubled:
                use.node.replace_input_with(use.idx, doubled.outputs[0])
        graph.insert_after(node, doubled)

    return change


_NORM = "model.layers.1.post_attention_layernorm"
FAULTS = {
    "epsilon": ("receiver", norm_epsilon(_NORM, 1.0), _NORM),
    "epsilon of a fuser": ("fuser0", norm_epsilon("projectors.2.key.mlp1.0", 1.0), "projectors.2.key.mlp1.0"),
    "scale": ("receiver", attention_scale(2), "model.layers.2.self_attn"),
    "scale of a sharer": ("sharer0", attention_scale(0), "model.layers.0.self_attn"),
    "product": ("receiver", doubled_output("model.layers.2.mlp.up_proj"), "model.layers.2.mlp.up_proj"),
    "rotary base": ("receiver", faults.change_rotary_base(100.0), "model.rotary_emb"),
    "values for keys": ("sharer0", faults.swap_new_rows(1), "model.layers.1.self_attn.v_proj"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_node_and_the_module_are_named(fault: str, engine: str, checked_pair: FindPair, tmp_path: Path):
    graph, change, module = FAULTS[fault]
    pair = checked_pair(PAIR)
    with pair.copy(tmp_path) as bundle:
        faults.plant(bundle, engine, graph, change)
        context = pair.context(bundle, engine)
        (divergence,) = check_graphs(context).divergences
        found = bisect(context, divergence)
    assert found.graph == graph
    message = found.message.removeprefix(divergence.message)
    named = f"module {module}), " in message or f"what comes out of {module}: " in message
    assert named, message


def test_a_fault_is_not_found_where_none_is(checked_pair: FindPair):
    pair = checked_pair(PAIR)
    context = pair.context(pair.bundle, "ort-cpu-int4")
    found = bisect(context, Divergence(graph="receiver", message="Something."))
    assert found.message.startswith("Something. Bisect: the graph agrees when run in float32")
