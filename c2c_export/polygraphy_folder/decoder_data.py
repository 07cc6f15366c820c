"""Inputs of a receiver's or a sharer's graph for Polygraphy's --data-loader-script: prompts over random caches.

    polygraphy run graphs/receiver.onnx --onnxrt --data-loader-script polygraphy/receiver.py

Written by c2c-export, the same for every decoder: what the graph takes and the prompts' tokens are in the JSON file
beside this one. Yields each prompt from row 0 on, then one step of two requests with different numbers of rows. Needs
numpy alone; equal in every run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0


def load_data() -> Iterator[dict[str, Any]]:
    """Yield feeds: arrays by input name, caches in float32."""
    graph = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    for ids in graph["prompts"]:
        yield feed(graph["inputs"], np.array([ids]), np.array([0]))
    first, capacity = graph["prompts"][0], graph["capacity"]
    yield feed(graph["inputs"], np.array([first[:1], first[-1:]]), np.array([1, capacity - 1]))


def feed(shapes: dict[str, list[Any]], ids: Any, write_index: Any) -> dict[str, Any]:
    """One call: `ids` [B,S] behind `write_index` [B] rows of random caches."""
    batch, tokens = ids.shape
    rows = write_index[:, None] + np.arange(tokens)
    arrays = {
        "input_ids": ids,
        "position_ids": rows,
        "write_index": write_index,
        "kv_length": write_index + tokens,
        "last_token": np.full(batch, tokens - 1),
    }
    random = np.random.default_rng(SEED)
    for name, shape in shapes.items():
        if name == "row_position_ids":
            arrays[name] = np.tile(np.arange(shape[1]), (batch, 1))
        elif name not in arrays:
            arrays[name] = random.standard_normal((batch, *shape[1:]), dtype=np.float32)
    return {name: arrays[name] for name in shapes}
