"""The CPU's lowered decoders compute what the portable graphs compute, and no layer is left to the slow operators."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnxscript.rewriter import RewriteRuleSet
from recorded_pairs import DECODERS, each_decoder, each_pair
from tiny_models import CAPACITY, CONFIGS, VOCAB, traced_model

from c2c_export.bundle import Bundle, ModelRecord
from c2c_export.errors import C2CError
from c2c_export.passes import RECEIVER_PASSES
from c2c_export.passes.fuse_rms_norms import fuse_rms_norms
from engines.base import View
from engines.ort.attention_rule import RowsInUse
from engines.ort.engine import CpuBuffer, OrtCpuEngine
from engines.ort.layout_rules import RESHAPE_RULE
from engines.ort.lower import lower_decoder

Array = np.ndarray[Any, Any]
HEADS_FIRST = (0, 2, 1, 3)

# Head sizes that `GroupQueryAttention` takes, and one that it does not.
every_architecture = pytest.mark.parametrize("name", CONFIGS)


def decoders_of(bundle: Bundle) -> Iterator[str]:
    return (name for name in bundle.manifest.graphs if not name.startswith("fuser"))


def model_of(bundle: Bundle, name: str) -> ModelRecord:
    manifest = bundle.manifest
    return manifest.receiver if name == "receiver" else manifest.sharers[int(name.removeprefix("sharer"))].model


@each_pair
def test_every_attention_becomes_one_that_costs_the_rows_in_use(pair: str, recorded_bundle: Callable[[str], Path]):
    bundle = Bundle.open(recorded_bundle(pair))
    record = bundle.manifest.engines["ort-cpu-fp32"]
    assert record.build is not None
    assert set(decoders_of(bundle)) == {name for found, name in DECODERS if found == pair}
    for name in decoders_of(bundle):
        portable = Counter(node.op_type for node in ir.load(bundle.file(bundle.manifest.graphs[name].path)).graph)
        lowered = ir.load(bundle.file(record.graphs[name])).graph
        found = Counter(node.op_type for node in lowered)
        rules = record.build.graphs[name].rules
        if model_of(bundle, name).head_dim % 8:
            assert rules == {}
            assert found == portable
            continue
        assert found["Attention"] == 0
        assert found["GroupQueryAttention"] == rules["fuse_attention"] == portable["Attention"]
        # What a sharer only writes into its highest layer's caches, without an attention that reads them.
        assert found["TensorScatter"] == portable["TensorScatter"] - 2 * portable["Attention"]
        for node in lowered:
            if node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm")) == HEADS_FIRST:
                assert {use.node.op_type for use in node.outputs[0].uses()} == {"TensorScatter"}


@each_pair
def test_lowered_graphs_share_the_portable_graphs_weights(pair: str, recorded_bundle: Callable[[str], Path]):
    bundle = Bundle.open(recorded_bundle(pair))
    record = bundle.manifest.engines["ort-cpu-fp32"]
    assert bundle.weights_folder(record) == bundle.root.absolute() / "graphs"
    for name, path in record.graphs.items():
        weights = bundle.manifest.graphs[name].num_bytes
        assert [file.name for file in bundle.file(path).parent.glob(f"{name}*")] == [f"{name}.onnx"]
        assert bundle.file(path).stat().st_size < weights / 2 + 500_000


class Both:
    """A portable decoder and its lowered form, over caches of their own that hold the same numbers."""

    @classmethod
    def of_bundle(cls, bundle: Bundle, name: str) -> "Both":
        record = bundle.manifest.engines["ort-cpu-fp32"]
        return cls(
            OrtCpuEngine(bundle.file(bundle.manifest.graphs[name].path), 1),
            OrtCpuEngine(bundle.file(record.graphs[name]), 1, weights_folder=bundle.weights_folder(record)),
        )

    def __init__(self, portable: OrtCpuEngine, lowered: OrtCpuEngine) -> None:
        self.portable, self.lowered = portable, lowered
        assert set(self.portable.inputs) == set(self.lowered.inputs)
        assert set(self.portable.outputs) == set(self.lowered.outputs)

    def outputs(self, inputs: dict[str, Array], seed: int) -> Iterator[tuple[str, Array, Array]]:
        """Each output's name and what both engines gave for it."""
        found = [self._run(engine, inputs, seed) for engine in (self.portable, self.lowered)]
        return ((name, found[0][name], found[1][name]) for name in found[0])

    def _run(self, engine: OrtCpuEngine, inputs: dict[str, Array], seed: int) -> dict[str, Array]:
        buffers: dict[str, CpuBuffer] = {}
        for spec in engine.inputs:
            generator = np.random.default_rng([seed, *spec.name.encode()])
            if spec.name.startswith("past_"):
                shape = (len(inputs["write_index"]), *(int(size) for size in spec.shape[1:]))
                buffers[spec.name] = CpuBuffer(shape, spec.dtype)
                buffers[spec.name].array[...] = generator.normal(size=shape)
            else:
                buffers[spec.name] = CpuBuffer(inputs[spec.name].shape, spec.dtype)
                buffers[spec.name].array[...] = inputs[spec.name]
        for spec in engine.outputs:
            past = buffers.get(f"past_{spec.name}")
            shape = (len(inputs["write_index"]), *(int(size) for size in spec.shape[1:]))
            buffers[spec.name] = CpuBuffer(shape, spec.dtype) if past is None else past
        views: dict[str, View] = {name: buffer.view() for name, buffer in buffers.items()}
        engine.run(engine.bind(views))
        return {spec.name: buffers[spec.name].array for spec in engine.outputs}


@pytest.fixture(scope="module")
def decoder_pairs(recorded_bundle: Callable[[str], Path]) -> Callable[[str, str], tuple[Bundle, Both]]:
    opened: dict[tuple[str, str], tuple[Bundle, Both]] = {}

    def load(pair: str, name: str) -> tuple[Bundle, Both]:
        if (pair, name) not in opened:
            bundle = Bundle.open(recorded_bundle(pair))
            opened[pair, name] = bundle, Both.of_bundle(bundle, name)
        return opened[pair, name]

    return load


@each_decoder
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lowered_decoders_equal_portable_ones(
    pair: str, name: str, data: st.DataObject, decoder_pairs: Callable[[str, str], tuple[Bundle, Both]]
):
    bundle, both = decoder_pairs(pair, name)
    # A prompt, or a step of several requests: several prompts at once are more than the operator takes.
    num_slots = data.draw(st.integers(1, 3), label="slots")
    num_tokens = data.draw(st.integers(1, 24), label="tokens") if num_slots == 1 else 1
    write_index = np.array([data.draw(st.integers(0, 100), label="write_index") for _ in range(num_slots)])
    num_hidden = data.draw(st.integers(0, 1 if num_tokens > 1 else 0), label="hidden")
    seed = data.draw(st.integers(0, 1000), label="seed")
    generator = np.random.default_rng(seed)
    # Positions with gaps, as an aligned prompt has them.
    positions = np.cumsum(generator.integers(1, 4, (num_slots, bundle.manifest.max_length)), axis=1) - 1
    vocab = model_of(bundle, name).vocab_size
    inputs = {
        "input_ids": generator.integers(0, vocab, (num_slots, num_tokens)),
        "position_ids": np.stack([positions[i, start : start + num_tokens] for i, start in enumerate(write_index)]),
        "write_index": write_index,
        "kv_length": write_index + num_tokens - num_hidden,
        "last_token": generator.integers(0, num_tokens, num_slots),
        "row_position_ids": positions,
    }
    for output, portable, lowered in both.outputs(inputs, seed):
        scale = np.abs(portable).max()
        assert np.abs(portable - lowered).max() <= 2e-5 * max(scale, 1.0), output
        if output != "logits":
            written = np.zeros(portable.shape, dtype=bool)
            for i, start in enumerate(write_index):
                written[i, :, start : start + num_tokens] = True
            assert np.array_equal(portable[~written], lowered[~written]), f"{output}: rows of others changed"


@every_architecture
@pytest.mark.parametrize(("num_slots", "num_tokens"), [(1, 7), (3, 1)])
def test_every_architecture_is_lowered_whole(name: str, num_slots: int, num_tokens: int, tmp_path: Path):
    traced = traced_model(name)
    model = ir.from_proto(traced.passed)
    counts = lower_decoder(model)
    config = traced.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, has_norms = config.num_hidden_layers, config.model_type in ("qwen3", "gemma3_text")
    if head_size % 8:
        assert counts == {}
    else:
        found = [counts[rule] for rule in ("fuse_attention", "rotary_before_transpose", "norm_before_transpose")]
        assert found == [layers, 2 * layers, 2 * layers if has_norms else 0]
    paths = tmp_path / "portable.onnx", tmp_path / "lowered.onnx"
    paths[0].write_bytes(traced.passed.SerializeToString())
    ir.save(model, paths[1])
    write_index = np.arange(num_slots) * 4
    positions = np.tile(np.arange(CAPACITY) + 2, (num_slots, 1))
    inputs = {
        "input_ids": np.random.default_rng(1).integers(0, VOCAB, (num_slots, num_tokens)),
        "position_ids": np.stack([positions[i, start : start + num_tokens] for i, start in enumerate(write_index)]),
        "write_index": write_index,
        "kv_length": write_index + num_tokens,
        "last_token": np.full(num_slots, num_tokens - 1),
        "row_position_ids": positions,
    }
    for output, portable, lowered in Both(*(OrtCpuEngine(path, 1) for path in paths)).outputs(inputs, 0):
        assert np.abs(portable - lowered).max() <= 2e-5 * max(np.abs(portable).max(), 1.0), output


@every_architecture
def test_a_graph_whose_norms_were_not_fused_is_refused(name: str):
    model = ir.from_proto(traced_model(name).traced)
    with pytest.raises(C2CError, match="its norm is no RMSNormalization; export the bundle again"):
        lower_decoder(model)


@every_architecture
def test_a_graph_whose_rotations_were_not_fused_is_refused(name: str):
    model = ir.from_proto(traced_model(name).traced)
    fuse_rms_norms(model)
    with pytest.raises(C2CError, match=r"layer .*: its rotation is no RotaryEmbedding; export the bundle again"):
        lower_decoder(model)


@every_architecture
def test_a_last_layer_that_computes_every_token_is_refused(name: str):
    model = ir.from_proto(traced_model(name).traced)
    for pass_name, apply in RECEIVER_PASSES:
        if pass_name != "select_last_token":
            apply(model)
    with pytest.raises(C2CError, match=r"layers.1.*: its product is computed of every token, not of the last"):
        lower_decoder(model)


@pytest.mark.parametrize(("size", "count"), [("S", 1), (None, 0)], ids=["named", "unknown"])
def test_reshapes_there_and_back_are_left_out_where_sizes_are_known(size: str | None, count: int):
    x = ir.Value(name="x", shape=ir.Shape([size, 6]), type=ir.TensorType(ir.DataType.FLOAT))
    shapes = [
        ir.Value(name=name, const_value=ir.tensor(np.array(shape), name=name))
        for name, shape in (("flat", [-1]), ("back", [-1, 6]))
    ]
    flat = ir.node("Reshape", [x, shapes[0]])
    back = ir.node("Reshape", [flat.outputs[0], shapes[1]])
    back.outputs[0].shape, back.outputs[0].dtype = ir.Shape([size, 6]), ir.DataType.FLOAT
    graph = ir.Graph([x], back.outputs, nodes=[flat, back], initializers=shapes, opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    assert RewriteRuleSet([RESHAPE_RULE]).apply_to_model(model) == count


def test_attention_without_a_scale_has_the_usual_one():
    traced = traced_model("llama_untied_biased")
    models = [ir.from_proto(traced.passed) for _ in range(2)]
    for node in models[0].graph:
        if node.op_type == "Attention":
            del node.attributes["scale"]
    scales = []
    for model in models:
        lower_decoder(model)
        fused = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        scales.append([node.attributes.get_float("scale") for node in fused])
    assert scales[0] == pytest.approx(scales[1])


def test_attention_with_a_softcap_is_refused():
    model = ir.from_proto(traced_model("llama_untied_biased").passed)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)
    with pytest.raises(C2CError, match=r"layers.0.*: its attention has no form that ONNX Runtime's operator covers"):
        lower_decoder(model)


def write_elsewhere(graph: ir.Graph) -> None:
    """Let every cache update write at the input `last_token`, which has the shape and type of `write_index`."""
    last_token = next(value for value in graph.inputs if value.name == "last_token")
    for node in graph:
        if node.op_type == "TensorScatter":
            node.replace_input_with(2, last_token)


def swap_caches(graph: ir.Graph) -> None:
    """Let layer 0 write its keys over the values that came in, and the other way round."""
    key, value = (node for node in list(graph) if node.op_type == "TensorScatter" and ".0" in str(node.outputs[0].name))
    old = key.inputs[0]
    key.replace_input_with(0, value.inputs[0])
    value.replace_input_with(0, old)


def hide_a_cache(graph: ir.Graph) -> None:
    """Leave layer 0's keys out of the outputs."""
    graph.outputs.pop(next(i for i, output in enumerate(graph.outputs) if output.name == "key.0"))


def compute_a_past(graph: ir.Graph) -> None:
    """Let layer 0 scatter its keys into a copy of the input."""
    scatter = next(node for node in graph if node.op_type == "TensorScatter")
    copy = ir.node("Abs", [scatter.inputs[0]])
    past, made = scatter.inputs[0], copy.outputs[0]
    assert past is not None
    made.name, made.shape, made.dtype = "copied", past.shape, past.dtype
    graph.insert_before(scatter, copy)
    scatter.replace_input_with(0, made)


@pytest.mark.parametrize("edit", [write_elsewhere, swap_caches, hide_a_cache, compute_a_past])
def test_caches_that_are_not_written_where_the_operator_writes_are_refused(edit: Callable[[ir.Graph], None]):
    model = ir.from_proto(traced_model("llama_untied_biased").passed)
    edit(model.graph)
    with pytest.raises(C2CError, match=r"layers\.0.*: its attention has no form that ONNX Runtime's"):
        lower_decoder(model)


def rows_of(graph: ir.Graph) -> ir.Value:
    """The constant that numbers the rows of the caches."""
    return next(
        value
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.size == CAPACITY
        and np.array_equal(value.const_value.numpy().reshape(-1), np.arange(CAPACITY))
    )


def test_only_masks_are_shortened():
    model = ir.from_proto(traced_model("llama_untied_biased").passed)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    rows = rows_of(model.graph)
    doubled = ir.node("Add", [rows, rows])
    doubled.outputs[0].name, doubled.outputs[0].dtype, doubled.outputs[0].shape = "twice", rows.dtype, rows.shape
    model.graph.append(doubled)
    model.graph.outputs.append(doubled.outputs[0])
    lower_decoder(model)
    assert list(doubled.inputs) == [rows, rows]


def test_masks_of_other_numbers_than_the_rows_are_refused():
    model = ir.from_proto(traced_model("llama_untied_biased").passed)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    rows = rows_of(model.graph)
    assert rows.const_value is not None
    rows.const_value = ir.tensor(rows.const_value.numpy() + 1, name=rows.name)
    with pytest.raises(C2CError, match=f"a mask reads {rows.name}, expected the rows' numbers or row_position_ids"):
        lower_decoder(model)


def test_caches_of_unknown_capacity_are_refused():
    graph = ir.from_proto(traced_model("llama_untied_biased").passed).graph
    for node in graph:
        if node.op_type == "TensorScatter":
            node.outputs[0].shape = None
    with pytest.raises(C2CError, match="the graph's caches have no capacity in common"):
        RowsInUse(graph)


@pytest.mark.xdist_group("llama_from_gemma3_aligned")
def test_a_layer_that_no_rule_matches_is_an_error_that_names_it(recorded_bundle: Callable[[str], Path]):
    bundle = Bundle.open(recorded_bundle("llama_from_gemma3_aligned"))
    model = ir.load(bundle.file(bundle.manifest.graphs["sharer0"].path))
    norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
    transposed = next(
        value
        for norm in norms
        for value in norm.inputs
        if value is not None and (node := value.producer()) is not None and node.op_type == "Transpose"
    )
    # Something else reads it too, so it has to stay.
    model.graph.outputs.append(transposed)
    with pytest.raises(C2CError, match=r"^layer model\.layers\.\d+\.self_attn\.._norm: its RMSNormalization was not"):
        lower_decoder(model)
