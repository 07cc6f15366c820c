"""The weights of one projector: a state dict file in, checked float32 tensors out.

In: a `.pt` (PyTorch state dict) or `.safetensors` file, and the dimensions that its `projector_<i>.json` gives.
Out: `ProjectorWeights`, whose tensors have exactly the names and shapes of the reference's class C2CProjector.
Not covered: the reference's other projector classes and aggregators; the computation (see `c2c_export.trace.fuser`).
"""

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from c2c_export.errors import C2CError

# The reference saves the training temperature of the gates as a buffer; inference does not use it.
_UNUSED_TENSOR = "gate_temperature"


@dataclass(frozen=True, eq=False)
class ProjectorWeights:
    """One projector: its dimensions (heads and head sizes of both models, MLP sizes) and its weights.

    `state` maps the names of `projector_shapes` to contiguous float32 tensors of those shapes, on the CPU.
    """

    source_dim: int
    target_dim: int
    source_num_heads: int
    target_num_heads: int
    intermediate_dim: int
    hidden_dim: int
    num_layers: int
    state: dict[str, torch.Tensor]

    @property
    def key_gate_open(self) -> bool:
        """Whether the correction of the keys is added: the logit is above 0 (0.0 itself is closed)."""
        return bool(self.state["key_gate_logit"] > 0)

    @property
    def value_gate_open(self) -> bool:
        """Whether the correction of the values is added: the logit is above 0 (0.0 itself is closed)."""
        return bool(self.state["value_gate_logit"] > 0)


def projector_shapes(
    *,
    source_dim: int,
    target_dim: int,
    source_num_heads: int,
    target_num_heads: int,
    intermediate_dim: int,
    hidden_dim: int,
    num_layers: int,
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a C2CProjector with these dimensions, by name; matrices are [out, in]."""
    receiver_width = target_num_heads * target_dim
    input_width = source_num_heads * source_dim + receiver_width
    shapes: dict[str, tuple[int, ...]] = {}
    for side in ("key", "value"):
        shapes[f"{side}_gate_logit"] = ()
        linears = (("in", hidden_dim, input_width), ("scalar_head", target_num_heads, hidden_dim))
        for name, rows, columns in (*linears, ("proj_out", receiver_width, hidden_dim)):
            shapes[f"{side}_{name}.weight"] = (rows, columns)
            shapes[f"{side}_{name}.bias"] = (rows,)
        # The scalar MLP is the one that ignores intermediate_dim.
        mlps = (("mlp1", intermediate_dim, 1), ("scalar_mlp2", hidden_dim, 1))
        for name, width, num_blocks in (*mlps, ("proj_mlp2", intermediate_dim, num_layers - 2)):
            for block in range(num_blocks):
                prefix = f"{side}_{name}.blocks.{block}"
                shapes[f"{prefix}.norm.weight"] = (hidden_dim,)
                shapes[f"{prefix}.w1.weight"] = (width, hidden_dim)
                shapes[f"{prefix}.w2.weight"] = (hidden_dim, width)
    return shapes


def read_projector_state(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Read an existing `.pt` or `.safetensors` file, without executing any code that it may hold.

    Returns the tensors named in `shapes`, as float32. Raises `C2CError`, naming file and tensor, for a file that is
    empty, damaged or holds more than tensors, and for a tensor that is missing, unexpected, of another shape, not of
    a float dtype, or not finite.
    """
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise C2CError(f"{path}: holds a {type(loaded).__name__}, expected a state dict (tensors by name)")
    loaded.pop(_UNUSED_TENSOR, None)
    for name, shape in shapes.items():
        if name not in loaded:
            raise C2CError(f"{path}: tensor {name} is missing, expected shape {list(shape)}")
    for name, tensor in loaded.items():
        if name not in shapes:
            raise C2CError(
                f"{path}: unexpected entry {name} ({_describe(tensor)}); a C2CProjector has none of this name"
            )
    return {name: _checked(path, name, loaded[name], shape) for name, shape in shapes.items()}


def _load(path: Path) -> object:
    if path.stat().st_size == 0:
        raise C2CError(f"{path}: the file is empty; download or copy the fuser again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # torch.load does not compare the checksums that torch.save wrote; without this a flipped bit goes unseen.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (entry := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {entry} differs")
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {blocked[1]}" if blocked else "it is damaged or no PyTorch state dict"
        raise C2CError(
            f"{path}: refused, nothing in it was executed: {reason}; a state dict of plain tensors is expected"
        ) from error
    except Exception as error:  # a damaged file makes torch.load raise nearly anything, KeyError included
        raise C2CError(
            f"{path}: damaged, truncated or no {path.suffix} weight file; download or copy the fuser again"
        ) from error


def _checked(path: Path, name: str, tensor: object, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise C2CError(f"{path}: {name} is a {_describe(tensor)}, expected a dense tensor of {list(shape)}")
    if tuple(tensor.shape) != shape:
        raise C2CError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_floating_point():
        raise C2CError(f"{path}: tensor {name} has dtype {tensor.dtype}, expected a float dtype")
    tensor = tensor.detach().to(torch.float32).contiguous()
    num_bad = math.prod(shape) - int(torch.isfinite(tensor).sum())
    if num_bad:
        raise C2CError(f"{path}: tensor {name} holds {num_bad} values that are NaN or infinite in float32")
    return tensor


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"tensor of shape {list(value.shape)}, {value.layout}, on {value.device.type}"
