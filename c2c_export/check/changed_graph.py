"""An engine's own graph, changed and run again: with other attributes, or with more outputs.

In: the check's context and a changed copy of what `CheckedEngine.model` gave. Out: an engine of it, or a session, on
ONNX Runtime's CPU provider, whatever the target is.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from c2c_export.check.level import CheckContext
from c2c_export.errors import C2CError
from engines.base import Engine
from engines.lowering import weights_of
from engines.ort.engine import OrtCpuEngine
from engines.targets import target_of

_LEVEL, _FLOAT_ACTIVATIONS = "accuracy_level", 1
"""Of `MatMulNBits`: from 2 on, it rounds its activations."""


def load_changed(context: CheckContext, graph: str, model: ir.Model) -> Engine:
    """`model`, a changed copy of the engine's `graph`, as an engine. Raises `C2CError` where it cannot be loaded."""
    with _saved(context, graph, model) as (path, weights_folder):
        return OrtCpuEngine(path, context.options.num_threads, weights_folder=weights_folder)


def load_session(context: CheckContext, graph: str, model: ir.Model) -> ort.InferenceSession:
    """As `load_changed`, for graphs with outputs whose shapes nobody knows beforehand."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = context.options.num_threads or 0
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(_FLOAT_ACTIVATIONS))
    with _saved(context, graph, model) as (path, weights_folder):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
        try:
            return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise C2CError(f"{graph}: ONNX Runtime cannot load this graph with marked outputs: {error}") from error


@contextlib.contextmanager
def _saved(context: CheckContext, graph: str, model: ir.Model) -> Iterator[tuple[Path, Path]]:
    """The graph in a file for as long as it is loaded, and the folder of its weights.

    They are read where they lie, but for a graph that was lowered anew, whose own are written beside it.
    """
    bundle, record = context.bundle, context.record
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph}.onnx"
        if target_of(record.target).runs_on_onnx_runtime:
            ir.save(model, path)
            yield path, bundle.weights_folder(record) or bundle.file(record.graphs[graph]).parent
        else:
            ir.save(model, path, external_data=weights_of(path).name)
            yield path, path.parent


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
