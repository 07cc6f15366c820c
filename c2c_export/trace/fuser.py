"""Trace a fuser, all projectors and gates of one sharer, to the portable fuser graph.

In: a `FuserCheckpoint` and the shapes of both models' caches. Out: an ONNX model (opset 24, standard operators only)

    sharer_rows [N] i64, receiver_rows [N] i64, write_index [1] i64,
    sharer_key.<j>, sharer_value.<j> [1,Hs,C,Ds] f32, past_key.<i>, past_value.<i> [1,Ht,C,Dt] f32
    -> key.<i>, value.<i> [1,Ht,C,Dt] f32

The n-th fused token lies in row `sharer_rows[n]` of the sharer's caches and in row `receiver_rows[n]` of the
receiver's, whose rows are one run that starts at `write_index`. The receiver caches are updated in place: bind the same
buffer to `past_key.<i>` and `key.<i>`.

With `separate_unfused` (several sharers, fused in parallel) the projectors read the receiver's rows as they were before
any sharer touched them, from further inputs `unfused_key.<i>`, `unfused_value.<i>` [1,Ht,N,Dt], and each fuser adds its
correction to what the cache holds by then (arXiv 2510.03215, section on multiple sharers).

The gates are traced as they are trained, as a comparison with zero; `passes.fold_gates` compiles them away.
"""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from c2c_export.checkpoint import FuserCheckpoint
from c2c_export.projector import ProjectorWeights
from c2c_export.trace.decoder import OPSET

_EXAMPLE_TOKENS = 3
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class CacheShape:
    """Heads and head size of a model's key/value cache."""

    num_heads: int
    head_dim: int


def trace_fuser(
    fuser: FuserCheckpoint, sharer: CacheShape, receiver: CacheShape, max_length: int, *, separate_unfused: bool
) -> ir.Model:
    """Trace `fuser` over caches of `max_length` rows; see the module's docstring for the graph."""
    tokens = torch.export.Dim("fused_tokens", min=1, max=max_length)
    receiver_layers = [link.receiver_layer for link in fuser.links]
    sharer_layers = sorted({link.sharer_layer for link in fuser.links})

    def cache(shape: CacheShape, rows: int) -> torch.Tensor:
        return torch.zeros(1, shape.num_heads, rows, shape.head_dim)

    groups: dict[str, tuple[list[str], list[torch.Tensor], dict[int, Any]]] = {
        "rows": (
            ["sharer_rows", "receiver_rows"],
            [torch.arange(_EXAMPLE_TOKENS), torch.arange(_EXAMPLE_TOKENS)],
            {0: tokens},
        ),
        "write_index": (["write_index"], [torch.zeros(1, dtype=torch.int64)], {}),
        "sharer": (_names("sharer_", sharer_layers), [cache(sharer, max_length) for _ in sharer_layers * 2], {}),
        "past": (_names("past_", receiver_layers), [cache(receiver, max_length) for _ in receiver_layers * 2], {}),
    }
    if separate_unfused:
        names = _names("unfused_", receiver_layers)
        groups["unfused"] = (names, [cache(receiver, _EXAMPLE_TOKENS) for _ in names], {2: tokens})

    program = torch.onnx.export(
        _Fuser(fuser, sharer_layers).eval(),
        kwargs={group: tensors for group, (_, tensors, _) in groups.items()},
        dynamic_shapes={group: [dims] * len(tensors) for group, (_, tensors, dims) in groups.items()},
        input_names=[name for names, _, _ in groups.values() for name in names],
        output_names=_names("", receiver_layers),
        opset_version=OPSET,
        dynamo=True,
        optimize=False,  # the optimizer would turn the gates into constants that nobody could count
        verbose=False,
    )
    assert program is not None
    return program.model


def projector_modules(fuser: FuserCheckpoint) -> torch.nn.ModuleDict:
    """The modules that are traced, by projector; each has the sides `key` and `value`.

    A side takes the sharer's rows [1,N,Hs*Ds] and the receiver's [1,N,Ht*Dt] and gives the correction [1,Ht,N,Dt].
    """
    return torch.nn.ModuleDict({str(index): _Projector(weights) for index, weights in fuser.projectors.items()})


def _names(prefix: str, layers: list[int]) -> list[str]:
    return [f"{prefix}{kind}.{layer}" for layer in layers for kind in ("key", "value")]


class _Fuser(torch.nn.Module):
    """All projectors of one sharer over the gathered rows, written back in one run per cache."""

    def __init__(self, fuser: FuserCheckpoint, sharer_layers: list[int]) -> None:
        super().__init__()
        self.links = fuser.links
        self.sharer_index = {layer: i for i, layer in enumerate(sharer_layers)}
        self.projectors = projector_modules(fuser)

    def forward(
        self,
        rows: list[torch.Tensor],
        write_index: list[torch.Tensor],
        sharer: list[torch.Tensor],
        past: list[torch.Tensor],
        unfused: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        sharer_rows, receiver_rows = rows
        outputs = []
        for number, link in enumerate(self.links):
            projector = self.projectors[str(link.projector)]
            for kind, side in enumerate((projector.key, projector.value)):
                source = sharer[2 * self.sharer_index[link.sharer_layer] + kind]
                target = past[2 * number + kind]
                current = target.index_select(2, receiver_rows)  # [1,Ht,N,Dt]
                read = current if unfused is None else unfused[2 * number + kind]
                correction = side(_flatten_heads(source.index_select(2, sharer_rows)), _flatten_heads(read))
                outputs.append(
                    torch.onnx.ops.symbolic(
                        "TensorScatter",
                        (target, current + correction, write_index[0]),
                        {"axis": 2, "mode": "linear"},
                        dtype=target.dtype,
                        shape=target.shape,
                        version=OPSET,
                    )
                )
        return tuple(outputs)


class _Projector(torch.nn.Module):
    """A trained `C2CProjector` at inference, its K side and its V side (arXiv 2510.03215, section on the fuser)."""

    def __init__(self, weights: ProjectorWeights) -> None:
        super().__init__()
        self.key = _ProjectorSide(weights, "key")
        self.value = _ProjectorSide(weights, "value")


class _ProjectorSide(torch.nn.Module):
    """`gate * sigmoid(weight head) * projection` for one of K and V; see the formulas in docs/architecture.md."""

    def __init__(self, weights: ProjectorWeights, kind: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim = weights.target_num_heads, weights.target_dim
        prefix = f"{kind}_"
        state = {name.removeprefix(prefix): t for name, t in weights.state.items() if name.startswith(prefix)}
        self.input = _linear(state, "in")
        self.mlp1 = _blocks(state, "mlp1", 1)
        self.proj_mlp2 = _blocks(state, "proj_mlp2", weights.num_layers - 2)
        self.proj_out = _linear(state, "proj_out")
        self.scalar_mlp2 = _blocks(state, "scalar_mlp2", 1)
        self.scalar_head = _linear(state, "scalar_head")
        self.gate_logit = torch.nn.Parameter(state["gate_logit"], requires_grad=False)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Source [1,N,Hs*Ds] and target [1,N,Ht*Dt] to the correction [1,Ht,N,Dt]."""
        hidden = self.mlp1(self.input(torch.cat((source, target), dim=-1)))
        projection = self.proj_out(self.proj_mlp2(hidden))
        projection = projection.reshape(1, -1, self.num_heads, self.head_dim).transpose(1, 2)
        weight = torch.sigmoid(self.scalar_head(self.scalar_mlp2(hidden))).transpose(1, 2).unsqueeze(-1)  # [1,Ht,N,1]
        gate = (self.gate_logit > 0).to(projection.dtype)
        return gate * (weight * projection)


class _Block(torch.nn.Module):
    """`x + w2(gelu(w1(rmsnorm(x))))`, the reference's feed-forward sublayer."""

    def __init__(self, state: dict[str, torch.Tensor], name: str) -> None:
        super().__init__()
        self.norm_weight = torch.nn.Parameter(state[f"{name}.norm.weight"], requires_grad=False)
        self.w1 = _linear(state, f"{name}.w1")
        self.w2 = _linear(state, f"{name}.w2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Written out as the decoders write it, so that one fusion rule finds the norms of both.
        normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _NORM_EPSILON)
        return x + self.w2(torch.nn.functional.gelu(self.w1(self.norm_weight * normalized)))


class _Linear(torch.nn.Module):
    """`x @ weight.T + bias`, the weight stored transposed so that the graph holds no `Transpose` of a constant."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.t().contiguous(), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.matmul(x, self.weight)
        return product if self.bias is None else product + self.bias


def _blocks(state: dict[str, torch.Tensor], name: str, count: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(_Block(state, f"{name}.blocks.{i}") for i in range(count)))


def _linear(state: dict[str, torch.Tensor], name: str) -> "_Linear":
    return _Linear(state[f"{name}.weight"], state.get(f"{name}.bias"))


def _flatten_heads(rows: torch.Tensor) -> torch.Tensor:
    """[1,H,N,D] to [1,N,H*D], heads flattened token by token."""
    return rows.transpose(1, 2).reshape(1, rows.shape[2], -1)
