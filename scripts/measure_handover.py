"""Measure what it costs to hand a sharer's rows over in a Ray cluster: within a node, and from one node to another.

    python scripts/measure_handover.py [--tokens 128 --tokens 512 --tokens 2048] [--repeats 9] [--shape NAME]

Both nodes are on this machine, so that "between nodes" is two object stores and a loopback connection: no network is
measured. For each shape and length it takes the path of `runtime.server.ray.remote_sharers`: rows are copied out of a
cache, returned by a Serve replica, received, and written into another cache. Nothing is computed. Out: a table of
medians, and one line of JSON. Takes about a minute. Needs what the extra `ray` installs.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import LoggingConfig
from rich.console import Console
from rich.table import Table

from runtime.kept_rows import SharerRows
from runtime.prompt import ModelTokens
from runtime.server.ray.remote_sharers import RemoteSharers

_OBJECT_STORE = 2 * 2**30
_PLACES = {"here": "within a node", "there": "between nodes"}


@dataclass(frozen=True)
class Shape:
    """A sharer's caches: what its config.json says, and the bytes of a number."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * np.dtype(self.dtype).itemsize


SHAPES = {
    "Gemma-3-270M, fp32 (demo pair)": Shape(18, 1, 256, "float32"),
    "Qwen2.5-0.5B, fp32": Shape(24, 2, 64, "float32"),
    "Qwen2.5-7B, fp16": Shape(28, 4, 128, "float16"),
    "Llama-3.1-8B, fp16": Shape(32, 8, 128, "float16"),
}


class Caches:
    """A slot's caches, [H,C,D] each, as a decoder has them."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        size = (shape.num_heads, capacity, shape.head_dim)
        random = np.random.default_rng(0)
        self.arrays: dict[str, NDArray[Any]] = {
            f"{kind}.{layer}": random.random(size, dtype=np.float32).astype(shape.dtype)
            for layer in range(shape.num_layers)
            for kind in ("key", "value")
        }

    def take(self, num_rows: int) -> dict[str, NDArray[Any]]:
        """Copies of the first rows."""
        return {name: array[:, :num_rows].copy() for name, array in self.arrays.items()}

    def put(self, rows: SharerRows) -> None:
        """Write rows from the first one on."""
        for name, values in rows.rows.items():
            self.arrays[name][:, : values.shape[1]] = values


class Sharer:
    """Answers as `SharerReplica` does, from caches that hold the rows already."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._caches: tuple[Shape, Caches] | None = None

    def load(self, shape: Shape) -> None:
        self._caches = shape, Caches(shape, self._capacity)

    async def prefill(self, tokens: ModelTokens) -> SharerRows:
        assert self._caches is not None
        caches = self._caches[1]
        return await asyncio.to_thread(lambda: SharerRows(0, tokens, caches.take(len(tokens.ids))))

    async def nothing(self) -> None:
        """A call that hands nothing over."""


@dataclass(frozen=True)
class Result:
    """Medians for one shape and length."""

    shape: str
    bytes_per_token: int
    num_tokens: int
    place: str
    milliseconds: float
    """From asking to having the rows, copied out of the sharer's cache."""
    microseconds_per_token: float
    gigabytes_per_second: float
    write_milliseconds: float
    """Into the receiver's cache."""


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Two nodes on this machine, one replica on each."""
    with contextlib.ExitStack() as stack:
        node: dict[str, Any] = {"num_cpus": 4, "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
        nodes = Cluster(initialize_head=True, head_node_args={**node, "resources": {"here": 1}})
        stack.callback(nodes.shutdown)
        nodes.add_node(**node, resources={"there": 1})
        stack.callback(ray.shutdown)
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        stack.callback(serve.shutdown)
        yield


def deploy(capacity: int) -> dict[str, Any]:
    """A handle for each place."""
    handles = {}
    for place in _PLACES:
        options: dict[str, Any] = {"num_cpus": 0.1, "resources": {place: 0.1}}
        logs = LoggingConfig(log_level="ERROR")
        deployment = serve.deployment(Sharer, name="Sharer", ray_actor_options=options, logging_config=logs)
        handles[place] = serve.run(deployment.bind(capacity), name=place, route_prefix=None)
    return handles


async def median_seconds(call: Callable[[], Awaitable[object]], repeats: int) -> float:
    """Of so many calls, after one that is not counted; each result is dropped before the next call."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


async def measure(
    handles: dict[str, Any], shapes: dict[str, Shape], lengths: list[int], repeats: int
) -> tuple[list[Result], dict[str, float]]:
    """The results, and milliseconds of a call that hands nothing over by place."""
    results = []
    for name, shape in shapes.items():
        own = Caches(shape, max(lengths))
        for handle in handles.values():
            await handle.load.remote(shape)
        for num_tokens in lengths:
            tokens = ModelTokens(np.arange(num_tokens), np.arange(num_tokens))
            for place, handle in handles.items():
                sharers = RemoteSharers({0: handle})
                seconds = await median_seconds(lambda s=sharers, t=tokens: s.prefill(0, t, "one session"), repeats)  # type: ignore[misc]
                rows = await sharers.prefill(0, tokens, "one session")
                writes = []
                for _ in range(repeats):
                    started = time.perf_counter()
                    own.put(rows)
                    writes.append(time.perf_counter() - started)
                num_bytes = shape.bytes_per_token * num_tokens
                results.append(
                    Result(
                        shape=name,
                        bytes_per_token=shape.bytes_per_token,
                        num_tokens=num_tokens,
                        place=_PLACES[place],
                        milliseconds=1e3 * seconds,
                        microseconds_per_token=1e6 * seconds / num_tokens,
                        gigabytes_per_second=1e-9 * num_bytes / seconds,
                        write_milliseconds=1e3 * statistics.median(writes),
                    )
                )
                del rows
    empty = {place: 1e3 * await median_seconds(handle.nothing.remote, repeats) for place, handle in handles.items()}
    return results, empty


def show(results: list[Result], empty: dict[str, float]) -> None:
    table = Table("shape", "kB/token", "tokens", "where", "ms", "µs/token", "GB/s", "written, ms")
    for result in results:
        table.add_row(
            result.shape,
            f"{result.bytes_per_token / 1e3:.1f}",
            str(result.num_tokens),
            result.place,
            f"{result.milliseconds:.1f}",
            f"{result.microseconds_per_token:.1f}",
            f"{result.gigabytes_per_second:.2f}",
            f"{result.write_milliseconds:.1f}",
        )
    Console(width=120).print(table)
    for place, milliseconds in empty.items():
        print(f"A call that hands nothing over, {_PLACES[place]}: {milliseconds:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, action="append", help="Rows to hand over; repeatable.")
    parser.add_argument("--repeats", type=int, default=9, help="Calls that medians are taken of.")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="One of the shapes; repeatable. Default: all.")
    arguments = parser.parse_args()
    lengths = arguments.tokens or [128, 512, 2048]
    shapes = {name: SHAPES[name] for name in arguments.shape or SHAPES}
    with cluster():
        results, empty = asyncio.run(measure(deploy(max(lengths)), shapes, lengths, arguments.repeats))
    show(results, empty)
    print(json.dumps({"results": [asdict(result) for result in results], "empty_call_ms": empty}))


if __name__ == "__main__":
    main()
