"""One trained language model over caches that are given, computed by transformers' own modules, request by request.

In: a transformers causal language model, and either the inputs of the portable decoder graph (`run`) or the rows of one
request (`extend`). Out: what that graph must give. A row of a cache is one real token; what a token attends to is said
by a mask that is built here from rows and positions, not by the traced code's.

Not covered: a token that may attend to no row at all (a closing padding row behind a gap as long as the window), for
which transformers' eager attention takes the mean of all rows, and other attention functions something else.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

_MASK_BY_LAYER_TYPE = ("qwen2", "qwen3", "gemma3_text")
"""Architectures whose layers choose between two masks; the others have one for all layers."""


@dataclass(frozen=True, eq=False)
class CachedRows:
    """The n rows of one request in every layer's cache, and their positions."""

    keys: tuple[torch.Tensor, ...]
    """One per layer, float32 [1,H,n,D]."""
    values: tuple[torch.Tensor, ...]
    position_ids: torch.Tensor
    """int64 [n]."""

    def without_last(self, num_rows: int) -> "CachedRows":
        """The same without the last `num_rows` rows."""
        stop = len(self.position_ids) - num_rows
        return CachedRows(
            tuple(key[:, :, :stop] for key in self.keys),
            tuple(value[:, :, :stop] for value in self.values),
            self.position_ids[:stop],
        )


class TrainedDecoder:
    """See the module's docstring. `model` is in float32, in evaluation mode, with eager attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation("eager")
        self.model = model.eval()
        config = model.config
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(config.num_key_value_heads)
        """Of keys and values."""
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def no_rows(self) -> CachedRows:
        """The caches of a request that has no rows yet."""
        empty = torch.zeros(1, self.num_heads, 0, self.head_dim)
        layers = (empty,) * self.num_layers
        return CachedRows(layers, layers, torch.zeros(0, dtype=torch.int64))

    def extend(
        self,
        rows: CachedRows,
        ids: Sequence[int] | NDArray[np.int64],
        position_ids: Sequence[int] | NDArray[np.int64],
        *,
        kv_length: int | None = None,
        last_token: int | None = None,
    ) -> tuple[CachedRows, NDArray[np.float32]]:
        """Compute S tokens behind `rows`: all rows with the new ones, and the logits [V] of token `last_token`.

        No token attends to a row from `kv_length` on, by default to none but earlier rows and its own. `last_token`
        counts the new tokens and is by default the last one. `rows` is left as it is.
        """
        num_tokens, start = len(ids), len(rows.position_ids)
        new_positions = torch.tensor(np.asarray(position_ids), dtype=torch.int64)
        positions = torch.cat((rows.position_ids, new_positions))
        stop = start + num_tokens if kv_length is None else kv_length
        cache = DynamicCache()  # without the configuration, so that sliding layers keep all their rows
        for layer, (key, value) in enumerate(zip(rows.keys, rows.values, strict=True)):
            cache.update(key, value, layer)
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor(np.asarray(ids), dtype=torch.int64)[None],
                position_ids=new_positions[None],
                attention_mask=self._masks(positions, start, stop),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor([num_tokens - 1 if last_token is None else last_token]),
            )
        keys = tuple(layer.keys for layer in cache.layers)
        values = tuple(layer.values for layer in cache.layers)
        return CachedRows(keys, values, positions), output.logits[0, 0].numpy()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """What the portable decoder graph gives for `inputs`, which are left as they are.

        The inputs are that graph's (`c2c_export.trace.decoder`): `input_ids`, `position_ids` [B,S], `write_index`,
        `kv_length`, `last_token` [B], `row_position_ids` [B,C], `past_key.<i>`, `past_value.<i>` [B,H,C,D]. Whatever a
        pruned graph lacks may be left out: nothing that it computes depends on it. Returns `logits` [B,1,V] and
        `key.<i>`, `value.<i>` [B,H,C,D] of all layers: S rows written from `write_index` on, the others as given.
        """
        ids = inputs["input_ids"]
        batch, num_tokens = ids.shape
        capacity = next(array.shape[2] for name, array in inputs.items() if name.startswith("past_"))
        empty = np.zeros((batch, self.num_heads, capacity, self.head_dim), dtype=np.float32)
        outputs: dict[str, NDArray[np.float32]] = {}
        for layer in range(self.num_layers):
            for kind in ("key", "value"):
                outputs[f"{kind}.{layer}"] = inputs.get(f"past_{kind}.{layer}", empty).astype(np.float32)
        logits = []
        for request in range(batch):
            start = int(inputs["write_index"][request])
            stop = start + num_tokens
            new_positions = _row(inputs, "position_ids", request, np.arange(start, stop))
            row_positions = _row(inputs, "row_position_ids", request, np.arange(capacity))

            def cached(kind: str, request: int = request, start: int = start) -> tuple[torch.Tensor, ...]:
                caches = (outputs[f"{kind}.{layer}"] for layer in range(self.num_layers))
                return tuple(torch.tensor(cache[request : request + 1, :, :start]) for cache in caches)

            before = CachedRows(cached("key"), cached("value"), torch.tensor(row_positions[:start], dtype=torch.int64))
            after, of_last_token = self.extend(
                before,
                ids[request],
                new_positions,
                kv_length=int(_row(inputs, "kv_length", request, np.array(stop))),
                last_token=int(_row(inputs, "last_token", request, np.array(num_tokens - 1))),
            )
            logits.append(of_last_token[None])
            for layer in range(self.num_layers):
                for kind, caches in (("key", after.keys), ("value", after.values)):
                    outputs[f"{kind}.{layer}"][request, :, start:stop] = caches[layer][0, :, start:].numpy()
        return {"logits": np.stack(logits), **outputs}

    def holding(self, weights: Mapping[str, NDArray[Any]]) -> "TrainedDecoder":
        """The same model with other values of the parameters that `weights` names as its state dict does.

        All others are shared, not copied. Tied parameters have two names, and each is replaced by its own only: an
        engine may round an embedding and an LM head differently. Raises `ValueError` for an unknown name or shape.
        """
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        for name, value in weights.items():
            module_name, _, parameter = name.rpartition(".")
            module = model.get_submodule(module_name)
            replaced = getattr(module, parameter, None)
            if replaced is None or tuple(replaced.shape) != value.shape:
                found = "no such parameter" if replaced is None else f"the model's has shape {list(replaced.shape)}"
                raise ValueError(f"{name}, of shape {list(value.shape)}: {found}")
            tensor = torch.tensor(np.ascontiguousarray(value, dtype=np.float32))
            setattr(module, parameter, torch.nn.Parameter(tensor, requires_grad=False))
        return TrainedDecoder(model)

    def _masks(self, positions: torch.Tensor, start: int, kv_length: int) -> Any:
        """Additive masks [1,1,S,n] for the tokens in the rows from `start` on, in the form that the model takes."""
        rows = torch.arange(len(positions))
        full = (rows[None, :] <= rows[start:, None]) & (rows[None, :] < kv_length)
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        if config.model_type in _MASK_BY_LAYER_TYPE:
            sliding = full if window is None else full & _within(positions, start, window)
            return {"full_attention": _additive(full), "sliding_attention": _additive(sliding)}
        if config.model_type == "mistral" and window is not None:
            full = full & _within(positions, start, window)
        return _additive(full)


def _within(positions: torch.Tensor, start: int, window: int) -> torch.Tensor:
    """Whether a row's position lies less than the window behind the token's: bool [S,n]."""
    return positions[start:, None] - positions[None, :] < window


def _additive(seen: torch.Tensor) -> torch.Tensor:
    # Eager attention adds its mask to the scores. The least finite number, as minus infinity alone would give NaN.
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def _row(inputs: Mapping[str, NDArray[Any]], name: str, request: int, default: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(inputs[name][request] if name in inputs else default)
