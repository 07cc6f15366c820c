"""Find the first node of a graph whose value is off: run it with its modules' values marked as outputs, and compare.

In: a check's context and a divergence of the level `graphs`. Out: the divergence, its message followed by the ONNX
node, its operator, the module of the model, the error and the tolerance. The graph is run on ONNX Runtime's CPU
provider, activations left in float32, over the first feed of the level that fails; the trained modules hold the
engine's own weights.

Not covered: faults that show only where activations are rounded to 8 bits, or on another device; the message says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from c2c_export.check.bisect.points import Point, points_of
from c2c_export.check.bisect.recorded import Arrays, Recorded, record_decoder, record_fuser
from c2c_export.check.changed_graph import keep_activations_in_float, load_changed, load_session
from c2c_export.check.compare_graph import Compared, compare_graph
from c2c_export.check.comparing import row_errors, rows_of
from c2c_export.check.graph_cases import GraphCase, graph_cases
from c2c_export.check.level import CheckContext
from c2c_export.check.levels.graphs import graph_tolerances, precision_of_activations
from c2c_export.check.trained.fuser import TrainedFuser
from c2c_export.check_record import Divergence
from engines.model_layers import model_layer

_HEADS_FIRST = (0, 2, 1, 3)
_LAYOUT_OPERATORS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast")
"""They compute nothing: what is off comes from before them."""


@dataclass(frozen=True)
class FirstOff:
    """The first value of a graph that is off."""

    node: str
    op_type: str
    module: str
    """Which the node was traced from."""
    what: str
    """What the value is: a module's output or input, or new rows of a cache."""
    error: float
    tolerance: float
    num_agreeing: int
    """Values before it that agree."""

    def __str__(self) -> str:
        """A sentence."""
        return (
            f"Bisect: the first value that is off is that of node {self.node} ({self.op_type}, module {self.module}), "
            f"{self.what}: by {self.error:.2g} of its size, tolerance {self.tolerance:.2g}; the {self.num_agreeing} "
            "before it agree."
        )


def bisect(context: CheckContext, divergence: Divergence) -> Divergence:
    """`divergence` with what bisecting its graph found; see the module's docstring.

    Raises `C2CError` where ONNX Runtime's CPU provider cannot run the graph, as in bfloat16.
    """
    case = next((case for case in graph_cases(context) if case.graph == divergence.graph), None)
    if case is None:
        return divergence
    model = context.engine.model(case.graph)
    keep_activations_in_float(model)
    compared = _first_failing(context, case, model)
    if compared is None:
        found = "Bisect: the graph agrees when run in float32 on the CPU, so its rounding or its device is what is off."
    else:
        tolerance = graph_tolerances(case.graph, precision_of_activations(context.record)).caches
        first = _first_off(context, case, model, compared, tolerance)
        found = str(first or "Bisect: every module's value agrees; what is off lies behind them.")
    return divergence.model_copy(update={"message": f"{divergence.message} {found}"})


def _first_failing(context: CheckContext, case: GraphCase, model: ir.Model) -> Compared | None:
    tolerances = graph_tolerances(case.graph, precision_of_activations(context.record))
    engine = load_changed(context, case.graph, model)
    outputs = {spec.name for spec in engine.outputs}
    if not outputs & case.allowed:
        return None
    feeds = compare_graph(case, engine, tolerances)
    return next((compared for compared in feeds if compared.first_failed is not None), None)


def _first_off(
    context: CheckContext, case: GraphCase, model: ir.Model, compared: Compared, tolerance: float
) -> FirstOff | None:
    feed = compared.feed
    if isinstance(case.trained, TrainedFuser):
        recorded = record_fuser(case.trained, feed)
    else:
        recorded = record_decoder(case.trained, feed)
    points = points_of(model)
    values = _run(context, case.graph, model, points, feed.inputs)
    last_token = feed.inputs.get("last_token")
    num_agreeing = 0
    for point in points:
        assert point.value.name is not None
        value, expected = values[point.value.name], _expected(point, recorded, compared)
        if case.is_fuser and point.cache is not None and expected:
            # The rows are the cache's but for a correction that may be small.
            fed = rows_of(feed.inputs[f"past_{point.cache}"], feed.written)
            value, expected = value - fed, [expected[0] - fed.transpose(_HEADS_FIRST)]
        error = _error(value, expected, last_token)
        if error is None:
            continue
        if error > tolerance:
            node = _computing(point.node)
            name = node.name or point.value.name
            return FirstOff(name, node.op_type, model_layer(node), _what(point), error, tolerance, num_agreeing)
        num_agreeing += 1
    return None


def _run(
    context: CheckContext, graph: str, model: ir.Model, points: list[Point], inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The values of all points, the graph's own outputs left as they are."""
    for point in points:
        if not point.value.is_graph_output():
            model.graph.outputs.append(point.value)
    read = {value.name for value in model.graph.inputs}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), OnnxrtRunner(load_session(context, graph, model)) as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
        feed = {
            name: array.astype(metadata[name].dtype.numpy(), copy=False)
            for name, array in inputs.items()
            if name in read
        }
        return dict(runner.infer(feed))


def _expected(point: Point, recorded: Recorded, compared: Compared) -> Arrays:
    """What the value may be: one array for each time that the module was called."""
    if point.cache is not None:
        cache = compared.expected.get(point.cache)
        if cache is None:
            return []
        return [rows_of(cache, compared.feed.written).transpose(_HEADS_FIRST)]
    if point.is_input:
        return list(recorded.inputs.get(point.module, ()))
    return list(recorded.outputs.get(point.module, ()))


def _error(value: NDArray[Any], expected: Arrays, last_token: NDArray[Any] | None) -> float | None:
    """The largest relative error of a row, against the array that fits best; None where none has the value's size."""
    errors = [
        float(row_errors(array, shaped).max(initial=0.0))
        for array, shaped in _pairs(value.astype(np.float32, copy=False), expected, last_token)
    ]
    return min(errors, default=None)


def _pairs(
    value: NDArray[Any], expected: Arrays, last_token: NDArray[Any] | None
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The value in each form that an array may be held in: as it is, heads first, or of the last token alone."""
    for array in expected:
        whole = array
        if value.size != array.size and last_token is not None and array.size and value.size == array[:, :1].size:
            whole = np.take_along_axis(array, last_token.reshape(-1, *[1] * (array.ndim - 1)), axis=1)
        if value.size == whole.size:
            yield whole, value.reshape(whole.shape)
            if value.ndim == 4:
                yield whole, value.transpose(_HEADS_FIRST).reshape(whole.shape)
        elif array.shape[:-1] == value.shape[:-1] and array.shape[-1] == 2 * value.shape[-1]:
            # A rotary embedding gives each cosine or sine twice; the graph may hold the angles.
            half = array[..., : value.shape[-1]]
            yield half, value
            yield half, np.cos(value)
            yield half, np.sin(value)


def _computing(node: ir.Node) -> ir.Node:
    """What computes the value that `node` gives, which may only move it."""
    while node.op_type in _LAYOUT_OPERATORS:
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if before is None:
            break
        node = before
    return node


def _what(point: Point) -> str:
    if point.cache is not None:
        return f"new rows of {point.cache}"
    return f"what {'goes into' if point.is_input else 'comes out of'} {point.module}"
