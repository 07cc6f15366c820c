"""The sizes of a graph's inputs and outputs, against what the manifest tells the runtime."""

from collections.abc import Iterator

import onnx_ir as ir

from c2c_export.bundle import GraphRecord
from c2c_export.check_record import Divergence


def check_shapes(name: str, graph: ir.Model, record: GraphRecord) -> Iterator[Divergence]:
    """A divergence for each input or output that `record` lacks, or gives other static sizes."""
    specs = {spec.name: spec for spec in (*record.inputs, *record.outputs)}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        spec = specs.get(str(value.name))
        if spec is None:
            yield Divergence(graph=name, message=f"the manifest lists no {value.name}, which the graph has")
            continue
        found = list(value.shape or ())
        pairs = zip(found, spec.shape, strict=False)
        is_same = len(found) == len(spec.shape) and all(
            ours == theirs for ours, theirs in pairs if isinstance(ours, int) and isinstance(theirs, int)
        )
        if not is_same:
            message = f"{value.name} is {value.shape} in the graph, {list(spec.shape)} in the manifest"
            yield Divergence(graph=name, message=message)
