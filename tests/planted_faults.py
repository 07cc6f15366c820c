"""Faults for checks to find, planted into a copy of a bundle, all hashes made right again.

In: the folder of a copy, the name of one of its engines and of a graph. Out: the copy with the fault, in the engine's
graph and, for an engine in fp32, in the portable one too; or in the manifest or an alignment table. Graphs are searched
by the modules that their nodes were traced from, so each fault works on every lowering for ONNX Runtime.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from c2c_export.bundle import Manifest, hash_folder, read_manifest, write_manifest
from engines.model_layers import model_layer

Change = Callable[[ir.Graph], None]
PRODUCTS = ("MatMul", "MatMulNBits")


def plant(bundle: Path, engine: str, graph: str, change: Change) -> None:
    """Change a graph of an engine in place; the portable graph too where the engine is in fp32."""
    manifest = read_manifest(bundle)
    record = manifest.engines[engine]
    paths = {record.graphs[graph]}
    if record.precision == "fp32":
        paths.add(manifest.graphs[graph].path)
    for path in paths:
        _edit(bundle / path, bundle / (record.weights_folder or Path(path).parent), change)
    make_hashes_right(bundle)


def plant_in_portable(bundle: Path, graph: str, change: Change) -> None:
    """Change a portable graph alone: no engine of the bundle computes with the fault, the next one built will."""
    path = bundle / read_manifest(bundle).graphs[graph].path
    _edit(path, path.parent, change)
    make_hashes_right(bundle)


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's fields."""
    fields = read_manifest(bundle).model_dump(mode="json")
    change(fields)
    write_manifest(bundle, Manifest.model_validate(fields))


def change_table(bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the alignment table of the first sharer."""
    path = bundle / "alignment" / "sharer0.npy"
    np.save(path, change(np.load(path)))
    make_hashes_right(bundle)


def make_hashes_right(bundle: Path) -> None:
    """Let the manifest have the hashes of the files as they are, and its engines those of the portable graphs."""
    manifest = read_manifest(bundle)
    files = hash_folder(bundle)
    engines = {}
    for name, record in manifest.engines.items():
        assert record.build is not None
        sources = {path: files[path] for path in record.build.sources}
        build = record.build.model_copy(update={"sources": sources})
        engines[name] = record.model_copy(update={"build": build})
    write_manifest(bundle, manifest.model_copy(update={"files": files, "engines": engines}))


def swap_new_rows(layer: int) -> Change:
    """The new keys go into the layer's value cache, the new values into its key cache."""

    def change(graph: ir.Graph) -> None:
        key, value = (_output(graph, f"{kind}.{layer}") for kind in ("key", "value"))
        if key.producer() is value.producer():
            node = key.producer()
            _exchange((node, 1), (node, 2))  # GroupQueryAttention
        else:
            _exchange((key.producer(), 1), (value.producer(), 1))

    return change


def swap_projections(layer: int) -> Change:
    """The layer's keys are projected with the weights of its values, and the other way round."""

    def change(graph: ir.Graph) -> None:
        key, value = (product(graph, f"model.layers.{layer}.self_attn.{name}_proj") for name in "kv")
        for index in range(1, len(key.inputs)):
            _exchange((key, index), (value, index))

    return change


def swap_sharer_caches(sharer_layer: int) -> Change:
    """The fuser reads the sharer's values of a layer where it should read its keys, and the other way round."""

    def change(graph: ir.Graph) -> None:
        _exchange_uses(*(_input(graph, f"sharer_{kind}.{sharer_layer}") for kind in ("key", "value")))

    return change


def close_gate(output: str) -> Change:
    """The cache `output` of a fuser gets its own rows back, without any correction."""

    def change(graph: ir.Graph) -> None:
        node = _output(graph, output).producer()
        current = next(value for value in _inputs_of(node, 1) if value.producer().op_type == "Gather")
        node.replace_input_with(1, current)

    return change


def shift_layer_map(graph: ir.Graph) -> None:
    """Every projector reads the sharer's next layer; of the highest one the first."""
    for kind in ("key", "value"):
        caches = sorted(value.name for value in graph.inputs if value.name.startswith(f"sharer_{kind}."))
        values = [_input(graph, name) for name in caches]
        uses = [list(value.uses()) for value in values]
        for number, of_value in enumerate(uses):
            for use in of_value:
                use.node.replace_input_with(use.idx, values[(number + 1) % len(values)])


def change_rotary_base(base: float) -> Change:
    """The rotary frequencies are those of another base."""

    def change(graph: ir.Graph) -> None:
        for node in list(graph):
            if node.op_type == "Mul" and "rotary_emb" in model_layer(node):
                index = next(i for i, value in enumerate(node.inputs) if value.is_initializer())
                size = node.inputs[index].const_value.shape[-1]
                powers = base ** (-np.arange(size) / size)
                shape = tuple(node.inputs[index].const_value.shape)
                replace(graph, node, index, powers.astype(np.float32).reshape(shape))

    return change


def spoil_last_block(module: str) -> Change:
    """The last block of a weight's last output is dequantised wrongly: in integers by another scale; else by half."""

    def change(graph: ir.Graph) -> None:
        node = product(graph, module)
        index = 2 if node.op_type == "MatMulNBits" else 1
        array = node.inputs[index].const_value.numpy().copy()
        if index == 2:
            array[-1, -1] *= 1.25  # scales [N,blocks]
        else:
            array[-32:, -1] *= 0.5  # [K,N]
        replace(graph, node, index, array)

    return change


def shift_last_zero_point(module: str) -> Change:
    """Of a matrix in 4 or 8 bits, the zero point of the first output's last block is one too high."""

    def change(graph: ir.Graph) -> None:
        node = product(graph, module)
        array = node.inputs[3].const_value.numpy().copy()
        num_blocks = node.inputs[2].const_value.shape[1]
        is_low = node.attributes.get_int("bits") == 8 or num_blocks % 2 == 1
        array[0, -1] += 1 if is_low else 16  # of two in a byte the last block's is the high one
        replace(graph, node, 3, array)

    return change


def enlarge_epsilon(module: str) -> Change:
    """A norm divides with an epsilon ten times as large."""

    def change(graph: ir.Graph) -> None:
        (node,) = (n for n in graph if n.op_type == "RMSNormalization" and model_layer(n) == module)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10 * node.attributes.get_float("epsilon"))

    return change


def shift_mask_of_second_request(graph: ir.Graph) -> None:
    """The second request of a batch does not see its newest row: its `kv_length` is one too small."""
    kv_length = _input(graph, "kv_length")
    uses = list(kv_length.uses())
    first = graph[0]
    constants = {
        name: _constant(graph, f"planted.{name}", np.array(value, dtype=np.int64))
        for name, value in (("start", 0), ("step", 1), ("axis", [0]))
    }

    def node(op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        new = ir.node(op_type, inputs, attributes)
        graph.insert_before(first, new)
        return new.outputs[0]

    size = node("Squeeze", [node("Shape", [kv_length]), constants["axis"]])
    numbers = node("Range", [constants["start"], size, constants["step"]])
    second = node("Cast", [node("Equal", [numbers, constants["step"]])], to=ir.DataType.INT64.value)
    shifted = node("Sub", [kv_length, second])
    for use in uses:
        use.node.replace_input_with(use.idx, shifted)


def product(graph: ir.Graph, module: str) -> ir.Node:
    """The product with a module's weight."""
    (node,) = (node for node in graph if node.op_type in PRODUCTS and model_layer(node) == module)
    return node


def replace(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Let `node` alone read another constant."""
    old = node.inputs[index]
    node.replace_input_with(index, _constant(graph, f"{old.name}.planted.{node.name}.{index}", array))
    if not old.uses():
        graph.initializers.pop(old.name)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _edit(path: Path, weights_folder: Path, change: Change) -> None:
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = weights_folder
    change(model.graph)
    ir.save(model, path)  # weights that are external stay where they are


def _exchange(first: tuple[ir.Node, int], second: tuple[ir.Node, int]) -> None:
    values = [node.inputs[index] for node, index in (first, second)]
    for (node, index), value in zip((first, second), reversed(values), strict=True):
        node.replace_input_with(index, value)


def _exchange_uses(first: ir.Value, second: ir.Value) -> None:
    uses = [list(value.uses()) for value in (first, second)]
    for of_value, other in zip(uses, (second, first), strict=True):
        for use in of_value:
            use.node.replace_input_with(use.idx, other)


def _inputs_of(node: ir.Node, index: int) -> list[ir.Value]:
    return [value for value in node.inputs[index].producer().inputs if value is not None]


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)
