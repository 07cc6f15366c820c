"""An engine's own graph, changed and run again: with other attributes, or with more outputs.

In: the check's context and a changed copy of what `CheckedEngine.model` gave. Out: an engine of it on ONNX Runtime's
CPU provider, whatever the target is.
"""

import tempfile
from pathlib import Path

import onnx_ir as ir

from c2c_export.check.level import CheckContext
from engines.base import Engine
from engines.lowering import weights_of
from engines.ort.engine import OrtCpuEngine
from engines.targets import target_of

_LEVEL, _FLOAT_ACTIVATIONS = "accuracy_level", 1
"""Of `MatMulNBits`: from 2 on, it rounds its activations."""


def load_changed(context: CheckContext, graph: str, model: ir.Model) -> Engine:
    """`model`, a changed copy of the engine's `graph`, loaded.

    Weights are read where they lie, but for a graph that was lowered anew, whose own are written beside it for the time
    of loading. Raises `C2CError` where the provider cannot load it.
    """
    bundle, record, num_threads = context.bundle, context.record, context.options.num_threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph}.onnx"
        if target_of(record.target).runs_on_onnx_runtime:
            ir.save(model, path)
            weights_folder = bundle.weights_folder(record) or bundle.file(record.graphs[graph]).parent
            return OrtCpuEngine(path, num_threads, weights_folder=weights_folder)
        ir.save(model, path, external_data=weights_of(path).name)
        return OrtCpuEngine(path, num_threads)


def keep_activations_in_float(model: ir.Model) -> bool:
    """Let no product of `model` round its activations; whether any did.

    ONNX Runtime multiplies a receiver's integer weights with activations rounded to 8 bits, which hides small faults.
    """
    rounding = [
        node for node in model.graph if node.attributes.get_int(_LEVEL, _FLOAT_ACTIVATIONS) > _FLOAT_ACTIVATIONS
    ]
    for node in rounding:
        node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, _FLOAT_ACTIVATIONS)
    return bool(rounding)
