"""Find the matrix products of a graph whose right-hand matrix is constant: what quantisation replaces.

In: a graph. Out: its `ConstantProduct`s. The matrix may be given as it is, or through `Transpose` (an LM head that
shares the embedding).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from c2c_export.errors import C2CError


@dataclass(frozen=True)
class ConstantProduct:
    """A product whose right-hand side is constant: `weight`, or its transpose."""

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        rows, columns = (int(size) for size in constant_tensor(self.weight).shape)
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> NDArray[np.float32]:
        """The right-hand matrix [K,N]; it may be a view of the weight, and is read from its file if it lies in one."""
        array = constant_tensor(self.weight).numpy()
        return np.asarray(array.T if self.transposed else array, dtype=np.float32)


def constant_products(graph: ir.Graph) -> Iterator[ConstantProduct]:
    """The products of `graph` with a constant matrix, in the order of its nodes, which may change meanwhile."""
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        weight = node.inputs[1]
        assert weight is not None
        producer = weight.producer()
        transposed = producer is not None and _turns_matrix(producer)
        if transposed:
            assert producer is not None
            weight = producer.inputs[0]
            assert weight is not None
        if weight.const_value is not None and weight.is_initializer() and len(weight.const_value.shape) == 2:
            yield ConstantProduct(node, weight, transposed)


def _turns_matrix(node: ir.Node) -> bool:
    """Whether `node` exchanges the two dimensions of a matrix."""
    return node.op_type == "Transpose" and (
        "perm" not in node.attributes or list(node.attributes.get_ints("perm")) == [1, 0]
    )


def lm_head(graph: ir.Graph) -> ir.Node | None:
    """The product that gives the logits, or what scales them gives; None in a graph without logits.

    Raises `C2CError` when there are logits and no product that gives them.
    """
    value = next((output for output in graph.outputs if output.name == "logits"), None)
    if value is None:
        return None
    while value is not None:
        node = value.producer()
        if node is None:
            break
        if node.op_type == "MatMul":
            return node
        # A scale, in whichever place, is an initializer or comes from a node without inputs.
        computed = [x for x in node.inputs if x is not None and not _is_given(x)]
        value = computed[0] if len(computed) == 1 else None
    raise C2CError("the graph's logits are not those of a product with the LM head; export the bundle again")


def _is_given(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() if producer is None else not producer.inputs


def constant_tensor(weight: ir.Value) -> ir.TensorProtocol:
    """The tensor of an initializer."""
    tensor = weight.const_value
    assert tensor is not None
    return tensor


def register_constant(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of `graph` that has the tensor's name."""
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
