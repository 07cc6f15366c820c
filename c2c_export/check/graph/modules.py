"""Which module of a trained model, and which parameter, a node of its graph stands for.

In: names of modules as `engines.model_layers.model_layer` reads them from a node. Out: names of torch's state dict, for
decoders, or "<projector>.<state name>" for fusers; layers; a projector's number and side.
"""

import re
from dataclasses import dataclass

import torch

from c2c_export.check_record import Kind

_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
_PROJECTOR_SIDE = re.compile(r"^(?:projectors\.)?(\d+)\.(key|value)[._](.+)$|^projectors\.(\d+)\.(key|value)$")


@dataclass(frozen=True)
class ProjectorSide:
    """What corrects the keys, or the values, of a receiver layer."""

    projector: int
    kind: Kind


def decoder_layer(name: str) -> int | None:
    """The layer of a decoder's module or parameter; None of one outside the layers."""
    match = _DECODER_LAYER.search(name)
    return int(match[1]) if match else None


def decoder_kind(name: str) -> Kind | None:
    """Whether a decoder's module or parameter makes keys or values; None of any other."""
    if re.search(r"\.k_(proj|norm)(\.|$)", name):
        return "key"
    return "value" if re.search(r"\.v_(proj|norm)(\.|$)", name) else None


def projector_side(name: str) -> ProjectorSide | None:
    """The side that a fuser's module or parameter belongs to; None of what belongs to none."""
    match = _PROJECTOR_SIDE.match(name)
    if match is None:
        return None
    return ProjectorSide(int(match[1] or match[4]), "key" if (match[2] or match[5]) == "key" else "value")


def parameter_name(module: str, parameter: str, *, is_norm: bool = False) -> str:
    """The name of `parameter`, "weight" or "bias", of a module of a decoder or of a fuser's graph.

    A fuser's graph has no module for its norms: they belong to their block.
    """
    match = re.fullmatch(r"projectors\.(\d+)\.(key|value)\.(.+)", module)
    if match is None:
        return f"{module}.{parameter}"
    projector, kind, inner = match.groups()
    inner = "in" if inner == "input" else re.sub(r"^(\w+)\.(\d+)", r"\1.blocks.\2", inner)
    norm = ".norm" if is_norm else ""
    return f"{projector}.{kind}_{inner}{norm}.{parameter}"


def submodule(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """A module of the model; None where it has none of this name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
