"""One trained projector, written from the formulas of the paper (arXiv 2510.03215; docs/architecture.md).

    x      = concat(sharer [N,Hs*Ds], receiver [N,Ht*Dt])
    h      = mlp1(in(x))
    weight = sigmoid(scalar_head(scalar_mlp2(h)))        [N,Ht]
    proj   = proj_out(proj_mlp2(h))                      [N,Ht*Dt]
    block(x) = x + w2(gelu(w1(rmsnorm(x))))

In: a projector's weights and rows of both caches. Out: the correction that an open gate adds, and the weight by head.
Not covered: whether the gate is open, which the caller asks (`ProjectorWeights.key_gate_open`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, linear, rms_norm

from c2c_export.check_record import Kind
from c2c_export.projector import ProjectorWeights

_NORM_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Correction:
    """What one side of a projector gives for N fused tokens."""

    added: torch.Tensor
    """float32 [Ht,N,Dt]: what is added to the receiver's rows; the weight is in it."""
    weight: torch.Tensor
    """float32 [N,Ht], 0 to 1: how strongly each head is corrected."""


def correct(weights: ProjectorWeights, kind: Kind, sharer: torch.Tensor, receiver: torch.Tensor) -> Correction:
    """The correction of the receiver's rows [Ht,N,Dt] from the sharer's [Hs,N,Ds], both float32, were the gate open."""
    state = {name.removeprefix(f"{kind}_"): t for name, t in weights.state.items() if name.startswith(f"{kind}_")}
    flat = [rows.permute(1, 0, 2).flatten(1) for rows in (sharer, receiver)]  # heads side by side, token by token
    with torch.no_grad():
        hidden = _blocks(state, "mlp1", 1, _linear(state, "in", torch.cat(flat, dim=1)))
        weight = torch.sigmoid(_linear(state, "scalar_head", _blocks(state, "scalar_mlp2", 1, hidden)))
        projected = _linear(state, "proj_out", _blocks(state, "proj_mlp2", weights.num_layers - 2, hidden))
    by_head = projected.unflatten(1, (weights.target_num_heads, weights.target_dim))  # [N,Ht,Dt]
    return Correction((by_head * weight[:, :, None]).permute(1, 0, 2), weight)


def _blocks(state: Mapping[str, torch.Tensor], name: str, count: int, x: torch.Tensor) -> torch.Tensor:
    for number in range(count):
        block = f"{name}.blocks.{number}"
        normalized = rms_norm(x, x.shape[-1:], state[f"{block}.norm.weight"], _NORM_EPSILON)
        x = x + _linear(state, f"{block}.w2", gelu(_linear(state, f"{block}.w1", normalized)))
    return x


def _linear(state: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))
