"""ONNX Runtime's CUDA provider over substitutes for it and CUDA: options, refusals, warnings, inputs on the host."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cudart import FakeCudart

import engines.cuda
from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError
from engines.cuda import CudaDevice
from engines.machine import CUDA_PROVIDER
from engines.ort import cuda as ort_cuda
from engines.ort.cuda import OrtCudaEngine, operators_elsewhere, require_provider

CPU_PROVIDER = "CPUExecutionProvider"


class FakeSession:
    """A session of a graph with a cache and a row number; `placed` says which provider has which operator."""

    placed: tuple[tuple[str, str], ...] = ((CUDA_PROVIDER, "TensorScatter"), (CUDA_PROVIDER, "Attention"))
    memories: tuple[str, ...] = ("Cuda", "Cuda")
    made: list["FakeSession"]

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        self.providers = providers
        self.log: list[tuple[str, ...]] = []
        FakeSession.made.append(self)

    def get_providers(self) -> list[str]:
        return [self.providers[0][0], self.providers[1]]

    def get_inputs(self) -> list[Any]:
        cache = SimpleNamespace(name="past_key.0", type="tensor(float)", shape=["batch", 1, 4, 2])
        return [SimpleNamespace(name="write_index", type="tensor(int64)", shape=["batch"]), cache]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="key.0", type="tensor(float)", shape=["batch", 1, 4, 2])]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=provider, get_nodes=lambda operator=operator: [SimpleNamespace(op_type=operator)])
            for provider, operator in self.placed
        ]

    def get_input_memory_infos(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.memories]

    def io_binding(self) -> Any:
        return SimpleNamespace(
            bind_input=lambda name, *_: self.log.append(("input", name)),
            bind_output=lambda name, *_: self.log.append(("output", name)),
        )

    def run_with_iobinding(self, prepared: Any, options: Any) -> None:
        self.log.append(("run",))


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(engines.cuda, "_cudart", fake)
    monkeypatch.setattr(ort_cuda.ort, "InferenceSession", FakeSession)
    monkeypatch.setattr(ort_cuda.ort, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER])
    monkeypatch.setattr(ort_cuda.ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(FakeSession, "made", [], raising=False)
    return fake


def place(monkeypatch: pytest.MonkeyPatch, *placed: tuple[str, str]) -> None:
    monkeypatch.setattr(FakeSession, "placed", (*FakeSession.placed, *placed))


def test_the_provider_computes_float32_on_the_devices_stream(cudart: FakeCudart):
    device = CudaDevice()
    OrtCudaEngine(Path("receiver.onnx"), device)
    (session,) = FakeSession.made
    name, options = session.providers[0]
    assert name == CUDA_PROVIDER
    assert options["use_tf32"] == "0"
    assert options["user_compute_stream"] == str(int(device.stream))


def test_operators_on_the_cpu_are_warned_of_once_by_name(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch):
    place(monkeypatch, (CPU_PROVIDER, "Range"), (CPU_PROVIDER, "Gather"), (CPU_PROVIDER, "Range"))
    with pytest.warns(UserWarning, match=r"receiver\.onnx: .* computes Gather, Range on the CPU") as caught:
        OrtCudaEngine(Path("receiver.onnx"), CudaDevice())
    assert len(caught) == 1


def test_all_on_the_gpu_is_no_warning(cudart: FakeCudart):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OrtCudaEngine(Path("receiver.onnx"), CudaDevice())


def test_a_graph_whose_caches_would_leave_the_gpu_is_refused(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch):
    place(monkeypatch, (CPU_PROVIDER, "TensorScatter"), (CPU_PROVIDER, "Range"))
    with pytest.raises(C2CError, match=r"receiver\.onnx: .* no CUDA kernel for TensorScatter in this graph"):
        OrtCudaEngine(Path("receiver.onnx"), CudaDevice())


@pytest.mark.parametrize(("memory", "again"), [("Cuda", []), ("Cpu", [("input", "write_index")])])
def test_an_input_that_is_read_on_the_host_is_copied_before_every_run(
    memory: str, again: list[tuple[str, ...]], cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
):
    """ONNX Runtime copies such an input when it is bound: a binding that is run again would give the row of before."""
    monkeypatch.setattr(FakeSession, "memories", (memory, "Cuda"))
    device = CudaDevice()
    engine = OrtCudaEngine(Path("receiver.onnx"), device)
    cache = device.allocate((1, 1, 4, 2), "float32")
    row = device.allocate((1,), "int64")
    binding = engine.bind({"write_index": row.view(), "past_key.0": cache.view(), "key.0": cache.view()})
    (session,) = FakeSession.made
    session.log.clear()
    cudart.log.clear()
    engine.run(binding)
    engine.run(binding)
    assert session.log == [*again, ("run",), *again, ("run",)]
    assert cudart.names().count("cudaStreamSynchronize") == 2 * len(again)


# What is really here


def test_a_missing_provider_is_named():
    require_provider([CUDA_PROVIDER, CPU_PROVIDER])
    with pytest.raises(C2CError, match=r"offers CPUExecutionProvider, but ort-cuda needs .*install_gpu\.sh"):
        require_provider([CPU_PROVIDER])


@pytest.mark.xdist_group("qwen3_from_qwen2")
def test_a_real_session_has_all_that_is_asked_of_it(recorded_bundle: Callable[[str], Path]):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = Bundle.open(recorded_bundle("qwen3_from_qwen2")).file("graphs/receiver.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=[CPU_PROVIDER])
    parts = session.get_provider_graph_assignment_info()
    caches, others = operators_elsewhere((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())
    assert caches == ["Attention", "TensorScatter"]
    assert "MatMul" in others
    assert {memory.name for memory in session.get_input_memory_infos()} == {"Cpu"}
    assert len(session.get_input_memory_infos()) == len(session.get_inputs())
    assert hasattr(onnxruntime, "preload_dlls")
