"""Inputs of a fuser's graph for Polygraphy's --data-loader-script: as many rows as prompts have, of random caches.

    polygraphy run graphs/fuser0.onnx --onnxrt --data-loader-script polygraphy/fuser0.py

Written by c2c-export, the same for every fuser: what the graph takes and the prompts' tokens are in the JSON file
beside this one. Yields one call per prompt, which fuses all its tokens but the last, and one of a single row behind
others, from another row of the sharer. Needs numpy alone; equal in every run.
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
        rows = np.arange(max(1, len(ids) - 1))
        yield feed(graph["inputs"], rows, rows)
    last = np.array([graph["capacity"] - 1])
    yield feed(graph["inputs"], last, last // 2)


def feed(shapes: dict[str, list[Any]], receiver_rows: Any, sharer_rows: Any) -> dict[str, Any]:
    """One call: the N `receiver_rows` [N] are corrected from the `sharer_rows` [N] opposite them."""
    arrays = {"receiver_rows": receiver_rows, "sharer_rows": sharer_rows, "write_index": receiver_rows[:1]}
    random = np.random.default_rng(SEED)
    for name, shape in shapes.items():
        if name not in arrays:
            sizes = [len(receiver_rows) if isinstance(size, str) else size for size in shape]
            arrays[name] = random.standard_normal(sizes, dtype=np.float32)
    return {name: arrays[name] for name in shapes}
