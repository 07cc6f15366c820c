"""Polygraphy runners of both sides: an engine that works in place on its caches, and the trained modules in torch.

In: a feed, numpy arrays by input name, caches in float32 whatever the engine stores. Out: outputs by name, in float32,
copies that stay valid. Both take more inputs than they use, so that one feed serves both. `Comparator.run` times,
pairs and saves what they give.

Not covered: what is fed (`c2c_export.check.feeds`), and how outputs are compared (`c2c_export.check.comparing`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from c2c_export.bundle import TensorSpec
from engines.base import Buffer, Engine, View

Feed = Mapping[str, NDArray[Any]]
_PAST = "past_"
_FED_AS_THEY_ARE = ("int64", "int32", "bool")


class Trained(Protocol):
    """What runs on the trained side: `TrainedDecoder` and `TrainedFuser`."""

    def run(self, inputs: Feed) -> dict[str, NDArray[np.float32]]:
        """Outputs by name, of inputs as the portable graph's."""


class EngineRunner(BaseRunner):
    """An engine of `engines.base`: every cache is one buffer, bound as `past_<name>` and as `<name>`.

    Buffers lie on the engine's own device, are kept from one feed to the next of the same shapes, and are freed by
    `deactivate`. Not thread-safe.
    """

    def __init__(self, load: Callable[[], Engine], name: str | None = None) -> None:
        """`load` is called by `activate`; what it raises, `activate` raises."""
        super().__init__(name=name, prefix="c2c-engine")
        self._load = load

    def activate_impl(self) -> None:
        """See `BaseRunner.activate`."""
        self._engine = self._load()
        self._buffers: dict[str, Buffer] = {}

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The inputs of the engine's graph; those in float16 and bfloat16 are fed in float32."""
        return metadata_of(self._engine.inputs)

    def infer_impl(self, feed_dict: Feed) -> dict[str, NDArray[Any]]:
        """Write the feed into the buffers, run once, and give copies of all outputs.

        `inference_time` is what the run alone took on the device, in seconds. Raises `ValueError` where shapes
        disagree with the graph's and `C2CError` where the engine cannot run them.
        """
        engine = self._engine
        sizes = _sizes(engine.inputs, feed_dict)
        views: dict[str, View] = {}
        read_from: dict[str, Buffer] = {}
        for spec in engine.inputs:
            buffer = self._buffer(spec.name, feed_dict[spec.name].shape, spec.dtype)
            buffer.write(feed_dict[spec.name], slice(None))
            views[spec.name] = buffer.view()
        inputs = {spec.name for spec in engine.inputs}
        for spec in engine.outputs:
            cache = _PAST + spec.name
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            buffer = self._buffers[cache] if cache in inputs else self._buffer(spec.name, shape, spec.dtype)
            views[spec.name], read_from[spec.name] = buffer.view(), buffer
        binding = engine.bind(views)
        start = engine.device.record()
        engine.run(binding)
        self.inference_time = engine.device.record().seconds_since(start)
        return {name: _as_float32(buffer.read(slice(None))) for name, buffer in read_from.items()}

    def deactivate_impl(self) -> None:
        """See `BaseRunner.deactivate`."""
        del self._engine, self._buffers

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = self._engine.device.allocate(shape, dtype)
        return buffer


class TrainedRunner(BaseRunner):
    """The trained modules in torch, `TrainedDecoder` or `TrainedFuser`."""

    def __init__(self, trained: Trained, inputs: Sequence[TensorSpec], name: str | None = None) -> None:
        """`inputs` are those that `trained` reads."""
        super().__init__(name=name, prefix="c2c-trained")
        self._trained = trained
        self._inputs = inputs

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The inputs that were named."""
        return metadata_of(self._inputs)

    def infer_impl(self, feed_dict: Feed) -> dict[str, NDArray[np.float32]]:
        """The outputs of the trained modules; `inference_time` is what they took, in seconds."""
        start = time.perf_counter()
        outputs = self._trained.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return outputs


def metadata_of(specs: Sequence[TensorSpec]) -> TensorMetadata:
    """Polygraphy's metadata of a graph's inputs, as they are fed: floats in float32, dynamic dimensions by name."""
    metadata = TensorMetadata()
    for spec in specs:
        metadata.add(spec.name, np.dtype(spec.dtype if spec.dtype in _FED_AS_THEY_ARE else "float32"), spec.shape)
    return metadata


def _sizes(specs: Sequence[TensorSpec], feed: Feed) -> dict[str, int]:
    """What each dynamic dimension is in this feed; `ValueError` where two inputs disagree."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise ValueError(f"{spec.name}: its dimension {dim} is {size}, that of another input {sizes[dim]}")
    return sizes


def _as_float32(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
