"""Trace a language model to the portable decoder graph, the same one for a receiver and for a sharer.

In: a transformers causal language model in float32. Out: an ONNX model (opset 24, standard operators only)

    input_ids [B,S] i64, position_ids [B,S] i64, write_index [B] i64, kv_length [B] i64, last_token [B] i64,
    row_position_ids [B,C] i64 (only if the model has sliding-window layers), past_key.<i>, past_value.<i> [B,H,C,D] f32
    -> logits [B,1,V] f32, key.<i>, value.<i> [B,H,C,D] f32

Every cache output is its input with S rows written from `write_index` on; bind the same buffer to both and nothing is
copied. Row r of a cache holds the r-th real token. Token s of a call may attend to rows up to its own
(`write_index + s`) that are below `kv_length`; in a sliding-window layer also only to rows whose position lies less
than the window behind its own. `row_position_ids` holds the positions of all rows, those of this call included.

The attention and cache operators are emitted as they are (`Attention`, `TensorScatter`) instead of being matched
afterwards. Not covered: softcapped attention scores, rotary bases that depend on the prompt's length.
"""

from typing import Any

import onnx_ir as ir
import torch
from transformers import AttentionInterface, PreTrainedModel

OPSET = 24
_ATTENTION = "c2c_onnx_attention"
_EXAMPLE_BATCH, _EXAMPLE_TOKENS = 2, 3


def trace_decoder(model: PreTrainedModel, max_length: int) -> ir.Model:
    """Trace `model` with caches of `max_length` rows. The weights stay shared with `model` until the graph is saved."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_shape = (_EXAMPLE_BATCH, config.num_key_value_heads, max_length, head_dim)
    layers = range(config.num_hidden_layers)
    window = sliding_window_of(config)

    batch, tokens = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("tokens", min=1, max=max_length)
    caches = [torch.zeros(cache_shape) for _ in range(2 * len(layers))]

    # Every input is a tensor of its own: the exporter takes one tensor passed twice for one input.
    def example(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.int64)

    inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {
        "input_ids": (example(_EXAMPLE_BATCH, _EXAMPLE_TOKENS), {0: batch, 1: tokens}),
        "position_ids": (example(_EXAMPLE_BATCH, _EXAMPLE_TOKENS), {0: batch, 1: tokens}),
        "write_index": (example(_EXAMPLE_BATCH), {0: batch}),
        "kv_length": (example(_EXAMPLE_BATCH), {0: batch}),
        "last_token": (example(_EXAMPLE_BATCH), {0: batch}),
    }
    if window is not None:
        inputs["row_position_ids"] = (example(_EXAMPLE_BATCH, max_length), {0: batch})

    cache_names = [f"{kind}.{i}" for i in layers for kind in ("key", "value")]
    previous = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        program = torch.onnx.export(
            _Decoder(model, window).eval(),
            kwargs={**{name: tensor for name, (tensor, _) in inputs.items()}, "caches": caches},
            dynamic_shapes={
                **{name: dims for name, (_, dims) in inputs.items()},
                "caches": [{0: batch} for _ in caches],
            },
            input_names=[*inputs, *(f"past_{name}" for name in cache_names)],
            output_names=["logits", *cache_names],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    finally:
        config._attn_implementation = previous
    assert program is not None
    return program.model


def sliding_window_of(config: Any) -> int | None:
    """The window, in positions, of the layers that have one; None when every layer attends to everything."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    # Mistral has one window for all layers. Others may carry the field of another architecture, which they ignore.
    by_layer = _has_layer_types(config) and "sliding_attention" in config.layer_types
    has_window = config.model_type == "mistral" or by_layer
    return int(window) if has_window else None


def _has_layer_types(config: Any) -> bool:
    """Whether the model picks one of two masks per layer."""
    return config.model_type in ("qwen2", "qwen3", "gemma3_text")


class _Decoder(torch.nn.Module):
    """The traced computation: masks from indices, the model's own layers, logits of one token per request."""

    def __init__(self, model: PreTrainedModel, window: int | None) -> None:
        super().__init__()
        self.model = model
        self.window = window

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        write_index: torch.Tensor,
        kv_length: torch.Tensor,
        last_token: torch.Tensor,
        caches: list[torch.Tensor],
        row_position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        cache = _InPlaceCache(caches, write_index)
        hidden = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self._masks(position_ids, write_index, kv_length, row_position_ids, caches[0].shape[2]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        chosen = last_token[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits = self.model.lm_head(hidden.gather(1, chosen))  # [B,1,V]
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return (logits, *cache.updated)

    def _masks(
        self,
        position_ids: torch.Tensor,
        write_index: torch.Tensor,
        kv_length: torch.Tensor,
        row_position_ids: torch.Tensor | None,
        capacity: int,
    ) -> Any:
        """Boolean masks [B,1,S,C] in the form that the model's forward takes as already prepared."""
        rows = torch.arange(capacity)[None, None, None, :]
        new_rows = write_index[:, None] + torch.arange(position_ids.shape[1])[None, :]  # [B,S]
        full = (rows <= new_rows[:, None, :, None]) & (rows < kv_length[:, None, None, None])
        sliding = full
        if row_position_ids is not None:
            distance = position_ids[:, None, :, None] - row_position_ids[:, None, None, :]
            sliding = full & (distance < self.window)
        if _has_layer_types(self.model.config):
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding


class _InPlaceCache:
    """Stands in for transformers' cache: `update` writes the new rows into the caller's buffers by `TensorScatter`."""

    def __init__(self, caches: list[torch.Tensor], write_index: torch.Tensor) -> None:
        self._caches = caches
        self._write_index = write_index
        self.updated: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        written = [
            torch.onnx.ops.symbolic(
                "TensorScatter",
                (past, new, self._write_index),
                {"axis": 2, "mode": "linear"},
                dtype=past.dtype,
                shape=past.shape,
                version=OPSET,
            )
            for past, new in zip(self._caches[2 * layer_idx : 2 * layer_idx + 2], (key, value), strict=True)
        ]
        self.updated.extend(written)
        return written[0], written[1]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Emit the ONNX operator `Attention` over 4-D tensors, grouped heads included, with an explicit boolean mask."""
    output = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, attention_mask),
        {"scale": float(scaling if scaling is not None else query.shape[-1] ** -0.5)},
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=OPSET,
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)
