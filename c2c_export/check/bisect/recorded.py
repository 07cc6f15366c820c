"""What the trained modules read and give in one call: recorded by forward hooks.

In: the trained side of a graph and a feed. Out: arrays by module name, as the graph's nodes name their modules
(`engines.model_layers.model_layer`). A decoder computes slot by slot; the arrays of all slots are put together again.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from c2c_export.check.feeds.feed import GraphFeed
from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser
from c2c_export.trace.fuser import projector_modules

Arrays = list[NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Recorded:
    """By module, what it read and gave, once for each time that it was called (as Gemma's rotary embedding is)."""

    inputs: Mapping[str, Arrays]
    outputs: Mapping[str, Arrays]
    """Of a module that gives several, all of them, one after another."""


def record_decoder(trained: TrainedDecoder, feed: GraphFeed) -> Recorded:
    """What every module of the decoder reads and gives for this feed, float32 [B,S,...]."""
    modules = {name: module for name, module in trained.model.named_modules() if name}
    with _hooked(modules) as calls:
        trained.run(feed.inputs)
    return calls.recorded(num_slots=len(feed.written))


def record_fuser(trained: TrainedFuser, feed: GraphFeed) -> Recorded:
    """What every module of the projectors with open gates reads and gives for this feed, float32 [1,N,...].

    The modules are those that were traced: the check's own formulas have none.
    """
    projectors = projector_modules(trained.checkpoint)
    sharer_rows, receiver_rows = feed.inputs["sharer_rows"], feed.inputs["receiver_rows"]
    modules = {f"projectors.{name}": module for name, module in projectors.named_modules() if name}
    with _hooked(modules) as calls, torch.no_grad():
        for link, kind in trained.open_gates():
            source = feed.inputs[f"sharer_{kind}.{link.sharer_layer}"][:, :, sharer_rows]
            unfused = feed.inputs.get(f"unfused_{kind}.{link.receiver_layer}")
            cache = feed.inputs[f"past_{kind}.{link.receiver_layer}"]
            target = cache[:, :, receiver_rows] if unfused is None else unfused
            modules[f"projectors.{link.projector}.{kind}"](_flat(source), _flat(target))
    return calls.recorded(num_slots=1)


@dataclass
class _Calls:
    inputs: dict[str, Arrays] = field(default_factory=dict)
    outputs: dict[str, list[Arrays]] = field(default_factory=dict)

    def recorded(self, num_slots: int) -> Recorded:
        inputs = {name: _by_call(arrays, num_slots) for name, arrays in self.inputs.items()}
        outputs = {}
        for name, calls in self.outputs.items():
            each = [_by_call(list(arrays), num_slots) for arrays in zip(*calls, strict=True)]
            outputs[name] = [array for arrays in each for array in arrays]
        return Recorded(inputs, outputs)


def _by_call(arrays: Arrays, num_slots: int) -> Arrays:
    """Each slot's calls follow one another: the first call of all slots together, the second of all, and so on.

    What has another shape in each slot, as attention weights over a slot's own rows, is left out.
    """
    per_slot = len(arrays) // num_slots
    calls = [arrays[call::per_slot] for call in range(per_slot)]
    return [np.concatenate(slots) for slots in calls if len({array.shape[1:] for array in slots}) == 1]


@contextlib.contextmanager
def _hooked(modules: Mapping[str, torch.nn.Module]) -> Iterator[_Calls]:
    calls = _Calls()

    def hook(name: str) -> Any:
        def record(_: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                calls.inputs.setdefault(name, []).append(_array(inputs[0]))
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [_array(tensor) for tensor in outputs if isinstance(tensor, torch.Tensor)]
            calls.outputs.setdefault(name, []).append(tensors)

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().numpy().copy()


def _flat(rows: NDArray[Any]) -> torch.Tensor:
    """[1,H,N,D] to [1,N,H*D]."""
    return torch.tensor(np.ascontiguousarray(rows.transpose(0, 2, 1, 3).reshape(1, rows.shape[2], -1)))
