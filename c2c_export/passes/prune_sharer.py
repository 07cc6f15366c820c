"""Cut a traced decoder down to what a sharer must compute: the caches that open gates read.

In: a decoder graph with all its outputs. Out: the same graph without logits, without anything above the highest layer
that is read, and in that layer with only the K and V that are read. Caches of the layers below it stay outputs even
when no gate reads them, because a later call (a further turn, a chunk) attends to their rows.
"""

import onnx_ir as ir

from c2c_export.passes.remove_unused import remove_unused

CacheName = tuple[int, str]
"""A layer and "key" or "value"."""


def prune_sharer(model: ir.Model, read: frozenset[CacheName]) -> int:
    """Remove the outputs that are not needed and all that only they needed; return how many outputs were removed.

    `read` must not be empty: a sharer that nothing reads has no graph at all.
    """
    highest = max(layer for layer, _ in read)

    def needed(name: str) -> bool:
        kind, _, layer = name.partition(".")
        return kind in ("key", "value") and (int(layer) < highest or (int(layer), kind) in read)

    dropped = [output for output in model.graph.outputs if not needed(output.name or "")]
    for output in dropped:
        model.graph.outputs.remove(output)
    _measure_input_ids(model.graph)
    remove_unused(model)
    return len(dropped)


def _measure_input_ids(graph: ir.Graph) -> None:
    """Take sizes from `input_ids`, which always stays, so that no other input stays for its size alone."""
    input_ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert input_ids.shape is not None
    for value in graph.inputs:
        assert value.shape is not None
        for node, _ in tuple(value.uses()):
            if node.op_type == "Shape" and "end" in node.attributes:
                end = node.attributes["end"].as_int()
                if value.shape.dims[:end] == input_ids.shape.dims[:end]:
                    node.replace_input_with(0, input_ids)
