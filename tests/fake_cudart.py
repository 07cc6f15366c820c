"""CUDA's runtime over host memory: copies are carried out at once, captured ones when their graph is launched.

For tests of `engines.cuda` where there is no GPU. `busy` says whether events are not reached yet; `log` holds what was
called, `refused` statuses by function. Memory is given back with the whole object; freeing it takes it out of `memory`.
"""

import ctypes
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cuda.bindings import runtime as real

Result = tuple[Any, ...]


class FakeCudart:
    """What `engines.cuda` calls; statuses, flags and kinds are the real module's."""

    cudaError_t, cudaMemcpyKind = real.cudaError_t, real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDefault, cudaEventWaitDefault = 1, 0, 0

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.refused: dict[str, Any] = {}
        self.busy = False
        self.memory: dict[int, Any] = {}
        self.freed: list[Any] = []
        self.captured: list[Callable[[], Any]] | None = None
        self.is_spoiled = False
        self._handles = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        """Functions without an effect here: they succeed, or are refused."""
        if not name.startswith("cuda") or not hasattr(real, name):
            raise AttributeError(name)
        return lambda *arguments: self.do(name, arguments, lambda: None)

    def names(self) -> list[str]:
        """The functions that were called, and what was queued, in their order."""
        return [name for name, _ in self.log]

    def do(self, name: str, arguments: Any, work: Callable[[], Any], *values: Any) -> Result:
        self.log.append((name, arguments))
        if name in self.refused:
            return (self.refused[name], *(None for _ in values))
        self.is_spoiled |= self.captured is not None and name in ("cudaMalloc", "cudaFree")
        work() if self.captured is None else self.captured.append(work)
        return (self.cudaError_t.cudaSuccess, *values)

    def cudaGetErrorString(self, status: Any) -> Result:
        return self.cudaError_t.cudaSuccess, b"a reason"

    def cudaStreamCreateWithFlags(self, flags: int) -> Result:
        return self.do("cudaStreamCreateWithFlags", flags, lambda: None, next(self._handles))

    def cudaEventCreateWithFlags(self, flags: int) -> Result:
        return self.do("cudaEventCreateWithFlags", flags, lambda: None, next(self._handles))

    def cudaEventQuery(self, event: int) -> Result:
        not_yet = self.cudaError_t.cudaErrorNotReady
        return (self.refused.get("cudaEventQuery", not_yet if self.busy else self.cudaError_t.cudaSuccess),)

    def cudaEventElapsedTime(self, start: int, stop: int) -> Result:
        return self.do("cudaEventElapsedTime", (start, stop), lambda: None, 1500.0)

    def cudaMalloc(self, num_bytes: int) -> Result:
        memory = ctypes.create_string_buffer(b"\xff" * num_bytes, num_bytes + 256)  # not zero by itself
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.memory[address] = memory
        return self.do("cudaMalloc", num_bytes, lambda: None, address)

    def cudaFree(self, address: int) -> Result:
        self.freed.append(self.memory.pop(address))
        return self.do("cudaFree", address, lambda: None)

    def cudaMemsetAsync(self, to: int, value: int, num_bytes: int, stream: Any) -> Result:
        return self.do("cudaMemsetAsync", num_bytes, lambda: ctypes.memset(to, value, num_bytes))

    def cudaMemcpyAsync(self, to: int, start: int, num_bytes: int, kind: Any, stream: Any) -> Result:
        return self.do("cudaMemcpyAsync", kind.name, lambda: ctypes.memmove(to, start, num_bytes))

    def cudaMemcpy2DAsync(
        self, to: int, to_pitch: int, start: int, pitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> Result:
        def copy() -> None:
            for row in range(height):
                ctypes.memmove(to + row * to_pitch, start + row * pitch, width)

        return self.do("cudaMemcpy2DAsync", kind.name, copy)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Result:
        result = self.do("cudaStreamBeginCapture", mode.name, lambda: None)
        self.captured, self.is_spoiled = [], False
        return result

    def cudaStreamEndCapture(self, stream: Any) -> Result:
        captured, self.captured = self.captured, None
        if self.is_spoiled:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return self.do("cudaStreamEndCapture", stream, lambda: None, SimpleNamespace(work=captured))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Result:
        return self.do("cudaGraphInstantiate", flags, lambda: None, list(graph.work))

    def cudaGraphLaunch(self, executable: list[Callable[[], Any]], stream: Any) -> Result:
        return self.do("cudaGraphLaunch", len(executable), lambda: [work() for work in executable])
