"""Integer weights for ONNX Runtime's CPU provider: constant matrices become `MatMulNBits`, embeddings 8-bit tables.

In: a graph in float32, portable or lowered for ONNX Runtime. Out: the same graph, changed in place, still in float32
but for

- the constant right-hand matrix of each product, in blocks of 32 rows with a scale and a zero point
  (`engines.ort.blocks`): 8 bits in "int8", 4 bits in "int4", where the LM head still has 8;
- the embedding, the table that `Gather` looks the graph's `input_ids` up in: 8 bits in both precisions, in
  `GatherBlockQuantized`. One that is the LM head too
  is stored once: the lookup reads the product's integers, block by block. (In memory ONNX Runtime packs the product's
  copy; of the stored one only the pages of rows that are looked up need to stay.)

In 4 bits a matrix may have *offsets*, what rounding its zero points leaves over: a number for each block, to be added
to all of its weights. A product with them is one with the sums of 32 activations each,

    x W = s x (v - z) + [sums of 32 of x] offsets

so the sums are put behind x, the offsets below W, and one `MatMulNBits` does both. That is 3 % more to multiply. It is
done where it removes most of the error, as in weights that come from files in Q4_1 or Q4_K: 4 bits hold those exactly
but for the zero point. docs/accuracy.md has the measurements behind every choice here.

A graph that generates tokens (it has logits) multiplies activations rounded to 8 bits (`accuracy_level` 4), several
times faster for single tokens; other graphs, which only read prompts, multiply them in float32 (level 1), faster for
many (docs/accuracy.md tells why a receiver has no second graph for its prompts).

Not quantised: biases, norms, matrices with fewer than 32 rows, and products of two activations. The integers of all
matrices are in memory until the graph is saved; they are what the engine itself will need.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from c2c_export.errors import C2CError
from engines.constant_products import ConstantProduct, constant_products, constant_tensor, lm_head, register_constant
from engines.model_layers import model_layer
from engines.ort.blocks import BLOCK_SIZE, Bits, Blocks, FloatMatrix, quantize, quantize_with_offsets
from engines.precision import check_range

_DOMAIN = "com.microsoft"
_PRODUCT = "MatMulNBits"
_LOOKUP = "GatherBlockQuantized"
_LEVEL = "accuracy_level"
_FLOAT_ACTIVATIONS, _INTEGER_ACTIVATIONS = 1, 4
# Offsets are used where they leave less than this share of the squared error.
_WORTH_OFFSETS = 0.1


@dataclass(frozen=True)
class QuantizedForCpu:
    """What quantisation did to a graph; each matrix counts once, however many operators read it."""

    matrices: int
    """Matrices of products that became integers."""
    with_offsets: int
    """Those of them that have offsets; only in int4."""
    embeddings: int
    """Tables that became integers."""
    kept_in_float: int
    """Matrices of products that stay in float32, as they have too few rows."""


_BITS: Mapping[str, Bits] = {"int8": 8, "int4": 4}


def quantize_for_cpu(model: ir.Model, precision: str) -> QuantizedForCpu:
    """Quantise the weights of `model` in place, to "int8" or "int4".

    Raises `C2CError` naming the model's layer of a weight that is not finite or too large, or the node whose shapes are
    unknown, and for another precision.
    """
    if precision not in _BITS:
        raise C2CError(f"precision {precision!r}: expected one of {', '.join(_BITS)}")
    return _Quantizing(model, _BITS[precision]).run()


class _Quantizing:
    def __init__(self, model: ir.Model, bits: Bits) -> None:
        self._model = model
        self._graph = model.graph
        self._bits: Bits = bits
        self._head = lm_head(model.graph)
        self._level = _FLOAT_ACTIVATIONS if self._head is None else _INTEGER_ACTIVATIONS
        self._weights: dict[tuple[ir.Value, bool, Bits], _Weight] = {}
        self._tables: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._extended: dict[ir.Value, ir.Value] = {}

    def run(self) -> QuantizedForCpu:
        kept = set()
        for product in constant_products(self._graph):
            if product.shape[0] < BLOCK_SIZE:
                kept.add(product.weight)
            else:
                self._replace_product(product)
        for node in list(self._graph):
            if _reads_table(node):
                self._replace_lookup(node)
        common.RemoveUnusedNodesPass()(self._model)
        if self._weights or self._tables:
            self._graph.opset_imports.setdefault(_DOMAIN, 1)
        with_offsets = sum(weight.has_offsets for weight in self._weights.values())
        return QuantizedForCpu(len(self._weights), with_offsets, len(self._tables), len(kept))

    def _replace_product(self, product: ConstantProduct) -> None:
        node = product.node
        bits: Bits = 8 if node is self._head else self._bits
        key = (product.weight, product.transposed, bits)
        if key not in self._weights:
            self._weights[key] = self._quantized(product, bits)
        weight = self._weights[key]
        activations = node.inputs[0]
        assert activations is not None
        if weight.has_offsets:
            activations = self._followed_by_sums(activations, node)
        num_rows, num_columns = product.shape
        attributes = {
            "K": num_rows + (num_rows // BLOCK_SIZE if weight.has_offsets else 0),
            "N": num_columns,
            "bits": bits,
            "block_size": BLOCK_SIZE,
            _LEVEL: self._level,
        }
        self._replace(node, _PRODUCT, [activations, *weight.values], attributes)

    def _quantized(self, product: ConstantProduct, bits: Bits) -> "_Weight":
        matrix = product.matrix()
        _check_matrix(matrix, product.node)
        blocks, has_offsets = quantize(matrix, bits), False
        if bits == 4 and len(matrix) % BLOCK_SIZE == 0:
            whole, offsets = quantize_with_offsets(matrix)
            extended = whole.followed_by_offsets(quantize(offsets, 4))
            if extended.error < _WORTH_OFFSETS * blocks.error:
                blocks, has_offsets = extended, True
        name = f"{product.weight.name}.int{bits}{'.transposed' if product.transposed else ''}"
        return _Weight(self._constants(blocks, name), has_offsets)

    def _constants(self, blocks: Blocks, name: str) -> tuple[ir.Value, ...]:
        return self._register(
            {
                name: blocks.packed_values(),
                f"{name}.scales": blocks.scales,
                f"{name}.zero_points": blocks.packed_zero_points(),
            }
        )

    def _followed_by_sums(self, activations: ir.Value, product: ir.Node) -> ir.Value:
        """[activations, their sums by block] along the last axis; computed once for all products that read them."""
        if activations not in self._extended:
            shape = activations.shape or _known_shape(product.outputs[0], product)
            # 0 copies a dimension, -1 is the number of blocks.
            blocked = self._insert(
                product, "Reshape", [activations, self._int64([0] * (len(shape) - 1) + [-1, BLOCK_SIZE])], {}
            )
            sums = self._insert(product, "ReduceSum", [blocked, self._int64([-1])], {"keepdims": 0})
            self._extended[activations] = self._insert(product, "Concat", [activations, sums], {"axis": -1})
        return self._extended[activations]

    def _replace_lookup(self, node: ir.Node) -> None:
        table, ids = node.inputs
        assert table is not None
        if table not in self._tables:
            matrix = constant_tensor(table).numpy()
            _check_matrix(matrix, node)
            self._tables[table] = self._table_of_head(table, matrix) or self._own_table(table, matrix)
        values, scales, zero_points = self._tables[table]
        inputs = [values, ids, scales, zero_points]
        axis = len(constant_tensor(values).shape) - 1
        attributes = {"gather_axis": 0, "quantize_axis": axis, "block_size": BLOCK_SIZE, "bits": 8}
        if axis == 1:
            self._replace(node, _LOOKUP, inputs, attributes)
            return
        # [...,blocks,32] to [...,D]
        blocks = self._insert(node, _LOOKUP, inputs, attributes, domain=_DOMAIN)
        width = int(constant_tensor(table).shape[1])
        leading = [0] * (len(_known_shape(node.outputs[0], node)) - 1)
        self._replace(node, "Reshape", [blocks, self._int64([*leading, width])], {}, domain="")

    def _own_table(self, table: ir.Value, matrix: FloatMatrix) -> tuple[ir.Value, ...]:
        """Integers [V,D], scales and zero points [V,blocks] of an embedding that is no LM head too."""
        # A row of the table is what a column is to a product.
        blocks = quantize(matrix.T, 8)
        name = f"{table.name}.rows.int8"
        return self._register(
            {
                name: blocks.values.reshape(len(matrix), -1)[:, : matrix.shape[1]],
                f"{name}.scales": blocks.scales,
                f"{name}.zero_points": blocks.zero_points,
            }
        )

    def _table_of_head(self, table: ir.Value, matrix: FloatMatrix) -> tuple[ir.Value, ...] | None:
        """The LM head's integers [V,blocks,32], where it is the embedding too; None where it is not, or is padded.

        Scales and zero points [V,blocks,1] are copies, as the two operators want them in different shapes.
        """
        head = self._weights.get((table, True, 8))
        if head is None or matrix.shape[1] % BLOCK_SIZE:
            return None
        values, scales, zero_points = head.values
        name = f"{table.name}.rows.int8"
        copies = {f"{name}.scales": scales, f"{name}.zero_points": zero_points}
        copied = {key: constant_tensor(value).numpy()[:, :, np.newaxis] for key, value in copies.items()}
        return (values, *self._register(copied))

    def _register(self, arrays: Mapping[str, NDArray[np.generic]]) -> tuple[ir.Value, ...]:
        """New constants of these names."""
        return tuple(register_constant(self._graph, ir.Tensor(array, name=key)) for key, array in arrays.items())

    def _insert(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, int], domain: str = ""
    ) -> ir.Value:
        metadata = dict(before.metadata_props)  # errors of the engine name the model's layer
        node = ir.node(op_type, inputs, attributes, domain=domain, metadata_props=metadata)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, int], domain: str = _DOMAIN
    ) -> None:
        old = node.outputs[0]
        new = self._insert(node, op_type, inputs, attributes, domain)
        new.producer().name = node.name
        new.shape, new.dtype = old.shape, old.dtype
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        new.name = old.name

    def _int64(self, values: list[int]) -> ir.Value:
        name = f"quantize.{'_'.join(str(value) for value in values)}"
        known = self._graph.initializers.get(name)
        return known or register_constant(self._graph, ir.Tensor(np.array(values, dtype=np.int64), name=name))


@dataclass(frozen=True)
class _Weight:
    values: tuple[ir.Value, ...]
    """Integers, scales, zero points: the inputs of a product."""
    has_offsets: bool


def _check_matrix(matrix: FloatMatrix, reader: ir.Node) -> None:
    """Raise `C2CError` naming the model's layer unless the values are finite, and so is the scale of any block."""
    check_range(matrix, ir.DataType.FLOAT, reader)
    low, high = float(matrix.min(initial=0)), float(matrix.max(initial=0))
    if high - low > np.finfo(np.float32).max:
        raise C2CError(
            f"layer {model_layer(reader)}: its weights go from {low:.3g} to {high:.3g}, which no scale in float32 "
            "covers; build in fp32"
        )


def _known_shape(output: ir.Value, node: ir.Node) -> ir.Shape:
    """The shape of an output of `node`, at least its rank. Raises `C2CError` naming the node where there is none."""
    if output.shape is None:
        raise C2CError(
            f"node {node.name} (layer {model_layer(node)}): its shape is unknown, so its weights cannot be quantised; "
            "infer the graph's shapes first"
        )
    return output.shape


def _reads_table(node: ir.Node) -> bool:
    """Whether `node` looks up the graph's token ids in a constant matrix that has at least a block of columns."""
    if node.op_type != "Gather" or node.domain != "":
        return False
    table, ids = node.inputs
    if ids is None or not ids.is_graph_input() or ids.name != "input_ids":
        return False
    if table is None or not table.is_initializer() or table.dtype != ir.DataType.FLOAT:
        return False
    shape = constant_tensor(table).shape
    return len(shape) == 2 and int(shape[1]) >= BLOCK_SIZE and node.attributes.get_int("axis", 0) == 0
