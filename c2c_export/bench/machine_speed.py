"""What this machine can do: the speed of matrix products, and the speed at which it reads memory.

Products are measured with ONNX Runtime, as engines compute them, over the models' own shapes, and with numpy's BLAS for
comparison. Reading is measured over an array far larger than the caches, both by numpy's reduction in as many threads
and by ONNX Runtime's product of one row with a large matrix, which is what a decode step does; the faster one counts.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from c2c_export.bench.report import GemmSpeed
from engines.cores import session_threads, usable_cores

_OPSET, _IR_VERSION = 21, 10
_WEIGHT_FILE = "gemm.data"
_READ_BYTES = 512 << 20
_ROW_PRODUCT = (4096, 32768)
"""[K,N]: as many bytes as `_READ_BYTES` in float32."""


def measure_gemms(shapes: Sequence[tuple[int, int, int]], threads: int | None, repeats: int) -> list[GemmSpeed]:
    """The best speed over `repeats` runs of each product [m,k] x [k,n], the second factor a weight."""
    return [GemmSpeed(m=m, k=k, n=n, gflops=_gemm_gflops(m, k, n, threads, repeats)) for m, k, n in shapes]


def measure_numpy_gflops(shapes: Sequence[tuple[int, int, int]], threads: int, repeats: int) -> float | None:
    """numpy's best speed over the same products; None unless `threads` is what its BLAS takes by itself."""
    if threads != len(usable_cores()):
        return None
    best = 0.0
    for m, k, n in shapes:
        left, right = np.ones((m, k), dtype=np.float32), np.ones((k, n), dtype=np.float32)
        out = np.empty((m, n), dtype=np.float32)
        best = max(best, 2e-9 * m * k * n / _fastest(partial(np.matmul, left, right, out=out), repeats))
    return best


def measure_read_speed(threads: int | None, num_threads: int, repeats: int) -> tuple[float, str]:
    """Gigabytes (1e9 bytes) per second that `num_threads` threads read, and by which of the two ways."""
    k, n = _ROW_PRODUCT
    session = _product_session(k, n, threads)
    row = np.ones((1, k), dtype=np.float32)
    by_product = 4e-9 * k * n / _fastest(partial(session.run, None, {"a": row}), repeats)
    del session
    parts = np.array_split(np.zeros(_READ_BYTES // 4, dtype=np.float32), num_threads)
    for part in parts:
        part.fill(1.0)  # else all pages would be one page of zeros
    with ThreadPoolExecutor(num_threads) as pool:
        by_maximum = 1e-9 * _READ_BYTES / _fastest(lambda: list(pool.map(np.maximum.reduce, parts)), repeats)
    if by_product > by_maximum:
        return by_product, f"ONNX Runtime's product of one row with a matrix [{k},{n}]"
    return by_maximum, f"numpy's maximum over {_READ_BYTES >> 20} MiB in {num_threads} thread(s)"


def _gemm_gflops(m: int, k: int, n: int, threads: int | None, repeats: int) -> float:
    session = _product_session(k, n, threads)
    rows = np.ones((m, k), dtype=np.float32)
    return 2e-9 * m * k * n / _fastest(partial(session.run, None, {"a": rows}), repeats)


def _product_session(k: int, n: int, threads: int | None) -> ort.InferenceSession:
    """A session over a [M,K] x weight [K,N], as engines are opened: the weight is read from a file.

    In the graph itself it would be in memory four times before the session has it.
    """
    rows = ir.Value(name="a", shape=ir.Shape(["M", k]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = ir.ExternalTensor(_WEIGHT_FILE, 0, 4 * k * n, ir.DataType.FLOAT, shape=ir.Shape([k, n]), name="b")
    weight = ir.Value(name="b", shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    product = ir.Value(name="c", shape=ir.Shape(["M", n]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "MatMul", [rows, weight], outputs=[product])
    graph = ir.Graph([rows], [product], nodes=[node], initializers=[weight], opset_imports={"": _OPSET}, name="gemm")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = session_threads(threads)
    with tempfile.TemporaryDirectory(prefix="c2c-export-") as folder:
        path = Path(folder, "gemm.onnx")
        row = np.full(n, 0.5, dtype=np.float32).tobytes()
        with path.with_name(_WEIGHT_FILE).open("wb") as file:
            file.writelines(row for _ in range(k))
        path.write_bytes(ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION)).SerializeToString())
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
