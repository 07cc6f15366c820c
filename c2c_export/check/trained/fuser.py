"""One trained fuser, all projectors of one sharer, over caches that are given.

In: the checkpoint, and the inputs of the portable fuser graph (`c2c_export.trace.fuser`). Out: what that graph must
give: the caches of every open gate with the fused rows corrected. Gates and layer map are the checkpoint's own, not the
manifest's.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from c2c_export.check.trained.projector import correct
from c2c_export.check_record import Kind
from c2c_export.checkpoint import FuserCheckpoint, ProjectorLink
from c2c_export.errors import C2CError


class TrainedFuser:
    """See the module's docstring."""

    def __init__(self, checkpoint: FuserCheckpoint) -> None:
        self.checkpoint = checkpoint

    def open_gates(self) -> Iterator[tuple[ProjectorLink, Kind]]:
        """Each link with each kind whose gate is open, by ascending receiver layer, keys first."""
        for link in self.checkpoint.links:
            projector = self.checkpoint.projectors[link.projector]
            if projector.key_gate_open:
                yield link, "key"
            if projector.value_gate_open:
                yield link, "value"

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """What the portable fuser graph gives for `inputs`, which are left as they are.

        The inputs are `sharer_rows`, `receiver_rows` [N], `write_index` [1], `sharer_key.<j>`, `sharer_value.<j>`
        [1,Hs,C,Ds], `past_key.<i>`, `past_value.<i>` [1,Ht,C,Dt] and, where several sharers are fused in parallel,
        `unfused_key.<i>`, `unfused_value.<i>` [1,Ht,N,Dt]. Returns `key.<i>`, `value.<i>` [1,Ht,C,Dt] of every open
        gate. Raises `C2CError` where a cache is missing that an open gate reads.
        """
        sharer_rows, receiver_rows = (np.asarray(inputs[name]) for name in ("sharer_rows", "receiver_rows"))
        first = int(inputs["write_index"][0])
        outputs: dict[str, NDArray[np.float32]] = {}
        for link, kind in self.open_gates():
            past = _cache(inputs, f"past_{kind}.{link.receiver_layer}", link, kind)
            current = past[0][:, receiver_rows]  # [Ht,N,Dt]
            unfused = inputs.get(f"unfused_{kind}.{link.receiver_layer}")
            correction = correct(
                self.checkpoint.projectors[link.projector],
                kind,
                sharer=_tensor(_cache(inputs, f"sharer_{kind}.{link.sharer_layer}", link, kind)[0][:, sharer_rows]),
                receiver=_tensor(current if unfused is None else unfused[0]),
            )
            fused = past.astype(np.float32)
            fused[0, :, first : first + len(receiver_rows)] = current + correction.added.numpy()
            outputs[f"{kind}.{link.receiver_layer}"] = fused
        return outputs

    def holding(self, weights: Mapping[str, NDArray[Any]]) -> "TrainedFuser":
        """The same fuser with other values of the tensors that `weights` names as "<projector>.<state name>".

        The rest is shared. Raises `ValueError` for an unknown name or shape.
        """
        states = {index: dict(projector.state) for index, projector in self.checkpoint.projectors.items()}
        for full_name, value in weights.items():
            index, _, name = full_name.partition(".")
            known = states.get(int(index), {}).get(name)
            if known is None or tuple(known.shape) != value.shape:
                found = "no such tensor" if known is None else f"the fuser's has shape {list(known.shape)}"
                raise ValueError(f"{full_name}, of shape {list(value.shape)}: {found}")
            states[int(index)][name] = _tensor(value)
        projectors = {
            index: dataclasses.replace(projector, state=states[index])
            for index, projector in self.checkpoint.projectors.items()
        }
        return TrainedFuser(dataclasses.replace(self.checkpoint, projectors=projectors))


def _cache(inputs: Mapping[str, NDArray[Any]], name: str, link: ProjectorLink, kind: Kind) -> NDArray[Any]:
    if name not in inputs:
        raise C2CError(
            f"the fuser has no input {name}, although projector {link.projector}'s {kind} gate is open in the "
            f"checkpoint, which corrects receiver layer {link.receiver_layer} from sharer layer {link.sharer_layer}"
        )
    return inputs[name]


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(array, dtype=np.float32))
