"""How near each phase comes to what the machine can do, from measured times and counted work.

share of a prefill or of fusing = needed operations / (seconds * GEMM speed), see `c2c_export.bench.work`
share of decoding               = bytes that a step must read / (seconds * read speed)

The work needed is that of the algorithm: logits of one token, no padding, nothing computed twice.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from c2c_export.bench.machine_speed import measure_gemms, measure_numpy_gflops, measure_read_speed
from c2c_export.bench.report import PromptRecord, RooflineRecord, SpeedShares
from c2c_export.bench.work import GraphWork, product_weight_bytes, read_graph_work
from c2c_export.bundle import Bundle, EngineRecord
from runtime.cache import cache_row_bytes

_NUM_SHAPES = 4
_LARGE_SHAPE = (512, 2048, 2048)
"""Measured besides, lest small models be held against the speed of small products."""


@dataclass(frozen=True)
class PairWork:
    """The products of a bundle's graphs, and what a decode step reads."""

    receiver: GraphWork
    sharers: dict[int, GraphWork]
    """By number, those that have open gates."""
    fusers: tuple[GraphWork, ...]
    step_weight_bytes: int
    row_bytes: int
    """Of one row of the receiver's caches."""


def read_pair_work(bundle: Bundle, engine: EngineRecord) -> PairWork:
    """Count the work of a bundle from its portable graphs, and the bytes of a step from the engine's own."""
    manifest = bundle.manifest
    graphs = {name: read_graph_work(bundle.file(graph.path)) for name, graph in manifest.graphs.items()}
    return PairWork(
        receiver=graphs["receiver"],
        sharers={int(name.removeprefix("sharer")): work for name, work in graphs.items() if name.startswith("sharer")},
        fusers=tuple(work for name, work in graphs.items() if name.startswith("fuser")),
        step_weight_bytes=product_weight_bytes(bundle.file(engine.graphs["receiver"])),
        row_bytes=cache_row_bytes(manifest.receiver_graph.inputs),
    )


def measure_roofline(
    work: PairWork,
    prompts: Sequence[PromptRecord],
    new_tokens: int,
    threads: int | None,
    num_threads: int,
    repeats: int,
) -> RooflineRecord:
    """Measure the machine and relate every prompt's phases to it; `threads` None is ONNX Runtime's default."""
    shapes = gemm_shapes(work, max(prompt.receiver_tokens for prompt in prompts))
    gemms = measure_gemms(shapes, threads, repeats)
    gflops = max(gemm.gflops for gemm in gemms)
    read_speed, read_by = measure_read_speed(threads, num_threads, repeats)
    return RooflineRecord(
        gemms=tuple(gemms),
        gemm_gflops=gflops,
        numpy_gflops=measure_numpy_gflops(shapes, num_threads, repeats),
        read_gb_per_second=read_speed,
        read_by=read_by,
        shares=tuple(speed_shares(work, prompt, new_tokens, gflops, read_speed) for prompt in prompts),
    )


def gemm_shapes(work: PairWork, num_rows: int) -> list[tuple[int, int, int]]:
    """[m,k,n] of the products that take most of a prefill of `num_rows` tokens, and of one large product."""
    total: Counter[tuple[int, int]] = Counter()
    for graph in (work.receiver, *work.sharers.values(), *work.fusers):
        for k, n in graph.weight_shapes:
            total[k, n] += k * n
    return [(num_rows, k, n) for (k, n), _ in total.most_common(_NUM_SHAPES)] + [_LARGE_SHAPE]


def speed_shares(
    work: PairWork, prompt: PromptRecord, new_tokens: int, gflops: float, read_speed: float
) -> SpeedShares:
    """The shares of one prompt; see the module's docstring. `gflops` and `read_speed` (GB/s) are the machine's."""
    needed = {
        "sharer_prefill": sum(work.sharers[number].flops(count) for number, count in prompt.sharer_tokens.items()),
        "receiver_prefill": work.receiver.flops(prompt.receiver_tokens, num_logits=1),
        "fuse": sum(fuser.flops(prompt.fused_tokens) for fuser in work.fusers),
    }
    needed["ttft"] = sum(needed.values())
    gflop = {phase: 1e-9 * flops for phase, flops in needed.items()}

    def share(phase: str) -> float | None:
        seconds = getattr(prompt.c2c, phase)
        return gflop[phase] / (seconds * gflops) if seconds > 0 and gflop[phase] > 0 else None

    receiver, ttft = share("receiver_prefill"), share("ttft")
    assert receiver is not None
    assert ttft is not None
    # Step i of n - 1 reads the prompt's rows and those of the i tokens before; i is (n - 2) / 2 on average.
    rows = prompt.receiver_tokens + (new_tokens - 2) / 2
    step_bytes = work.step_weight_bytes + round(rows * work.row_bytes)
    return SpeedShares(
        asked_tokens=prompt.asked_tokens,
        sharer_prefill=share("sharer_prefill"),
        receiver_prefill=receiver,
        fuse=share("fuse"),
        ttft=ttft,
        decode=step_bytes / (1e-3 * prompt.c2c.decode_ms_per_token * 1e9 * read_speed),
        gflop=gflop,
        decode_bytes=step_bytes,
    )
