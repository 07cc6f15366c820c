"""The engine that is checked: as a pipeline, and graph by graph.

In: a bundle and the record of one of its engines. Out: what the levels run (`pipeline`, `load_graph`) and what they
read (`model`). Everything is loaded when it is first asked for, and by the runtime's own functions.
"""

from functools import cached_property

import onnx_ir as ir

from c2c_export.bundle import Bundle, EngineRecord
from engines.base import Engine
from engines.lowering import lower
from engines.select import load_engine, new_device
from engines.targets import target_of
from runtime import C2CPipeline

_NUM_SLOTS = 4
"""A step of several requests must be checked too."""


class CheckedEngine:
    """See the module's docstring. Not thread-safe."""

    def __init__(self, bundle: Bundle, record: EngineRecord, num_threads: int | None) -> None:
        self._bundle = bundle
        self._record = record
        self._num_threads = num_threads

    @cached_property
    def pipeline(self) -> C2CPipeline:
        """The whole engine, as users run it. Raises `C2CError` where this machine cannot run it."""
        return C2CPipeline(self._bundle, self._record.target, self._record.precision, _NUM_SLOTS, self._num_threads)

    def load_graph(self, name: str) -> Engine:
        """One graph's engine, loaded anew; the caller owns it. Raises `C2CError` as `pipeline` does."""
        path, folder = self._bundle.file(self._record.graphs[name]), self._bundle.weights_folder(self._record)
        return load_engine(self._record.target, path, new_device(self._record.target), self._num_threads, folder)

    def model(self, name: str) -> ir.Model:
        """The ONNX graph that the engine was built from, with its weights.

        For ONNX Runtime it is the engine's own file; TensorRT's is lowered anew from the portable graph, which is
        deterministic. Weights are read from their file when they are used.
        """
        record = self._record
        if not target_of(record.target).runs_on_onnx_runtime:
            portable = self._bundle.file(self._bundle.manifest.graphs[name].path)
            return lower(portable, record.target, record.precision, is_fuser=name.startswith("fuser")).model
        model = ir.load(self._bundle.file(record.graphs[name]))
        folder = self._bundle.weights_folder(record)
        if folder is not None:
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value.base_dir = folder
        return model
