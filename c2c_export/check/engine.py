"""The engine that is checked: as a pipeline, and graph by graph.

In: a bundle and the record of one of its engines. Out: what the levels run (`pipeline`, `load_graph`) and what they
read (`model`). Everything is loaded when it is first asked for, and by the runtime's own functions.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.check.prompts import CalibrationPrompt
from engines.base import Engine
from engines.lowering import lower
from engines.select import load_engine, new_device
from engines.targets import target_of
from runtime import C2CPipeline, Generation, Message
from runtime.bundle_planner import BundlePlanner
from runtime.prompt import Plan

_NUM_SLOTS = 2
"""One prompt is open at a time, in a slot that is not the first: so that one which is taken for another is found. The
level `graphs` steps more slots at once, with caches of its own."""


@dataclass(frozen=True, eq=False)
class EnginePrompt:
    """A prompt that the engine has prefilled and fused."""

    plan: Plan
    keys: tuple[NDArray[np.float32], ...]
    """The receiver's real rows by layer, fused where they were: [Ht,n,Dt]."""
    values: tuple[NDArray[np.float32], ...]
    logits: NDArray[np.float32]
    """[V], of the last prompt token."""


class CheckedEngine:
    """See the module's docstring. Not thread-safe."""

    def __init__(self, bundle: Bundle, record: EngineRecord, num_threads: int | None) -> None:
        self._bundle = bundle
        self._record = record
        self._num_threads = num_threads
        self._prompts: dict[CalibrationPrompt, EnginePrompt] = {}
        self._generations: dict[tuple[CalibrationPrompt, int], Generation] = {}

    @cached_property
    def pipeline(self) -> C2CPipeline:
        """The whole engine, as users run it. Raises `C2CError` where this machine cannot run it."""
        return C2CPipeline(
            self._bundle,
            self._record.target,
            self._record.precision,
            _NUM_SLOTS,
            self._num_threads,
            allow_unchecked=True,
            allow_failed=True,
        )

    def release_pipeline(self) -> None:
        """Free the whole engine, if it is loaded; what it gave is kept, and asking again loads it anew."""
        self.__dict__.pop("pipeline", None)

    @cached_property
    def planner(self) -> BundlePlanner:
        """What plans prompts without loading an engine. Raises `BundleError` where the bundle is broken."""
        return BundlePlanner(self._bundle)

    def plan(self, prompt: CalibrationPrompt) -> Plan:
        """What the models are to read. Raises `UsageError` where it does not fit, `BundleError` as `planner` does."""
        messages = None if prompt.messages is None else [Message(m.role, m.content) for m in prompt.messages]
        sharers = tuple(range(len(self._bundle.manifest.sharers)))
        return self.planner.plan(messages, prompt.input_ids or (), sharers)

    def prefill(self, prompt: CalibrationPrompt) -> EnginePrompt:
        """What the whole engine makes of a prompt; computed once. Raises as `C2CPipeline.prefill` does."""
        if prompt not in self._prompts:
            num_layers = self._bundle.manifest.receiver.num_layers
            with self.pipeline.prefill(prompt.prompt) as session:
                caches = [session.kv(layer) for layer in range(num_layers)]
                keys, values = (tuple(pair[kind] for pair in caches) for kind in (0, 1))
                self._prompts[prompt] = EnginePrompt(session.plan, keys, values, session.logits)
        return self._prompts[prompt]

    def generate(self, prompt: CalibrationPrompt, new_tokens: int) -> Generation:
        """What the whole engine answers greedily, up to `new_tokens` or what the capacity has room for; likewise."""
        key = (prompt, new_tokens)
        if key not in self._generations:
            with self.pipeline.prefill(prompt.prompt) as session:
                room = self._bundle.manifest.max_length - len(session.position_ids) + 1
                self._generations[key] = session.generate(max_new_tokens=min(new_tokens, room))
        return self._generations[key]

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
