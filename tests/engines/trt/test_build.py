"""Building engines without a GPU: profiles, what is recorded, progress, failures, interrupts."""

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from c2c_export.bundle import ProfileRecord, ProfileSizes, TensorSpec, read_manifest
from c2c_export.errors import C2CError
from engines.lowering import lower, save_lowered
from engines.trt.build import BuiltEngine, EngineOptions, build_engine, decoder_profiles, fuser_profiles

trt = pytest.importorskip("tensorrt_rtx")

CAPACITY = 256
SIZES = ProfileSizes(max_batch=8, decode_optimum=2, prefill_optimum=100, fuse_optimum=32)
HEADS = 4


class Recorder:
    """Notes what a build reports; `at` is called at every step."""

    def __init__(self, at: Callable[[], None] = lambda: None) -> None:
        self.open: dict[str, list[int]] = {}
        self.parents: dict[str, str | None] = {}
        self.num_finished = 0
        self.was_stopped = False
        self._at = at

    def phase_started(self, phase: str, parent: str | None, num_steps: int) -> None:
        assert num_steps > 0
        self.open.setdefault(phase, []).append(num_steps)
        self.parents[phase] = parent

    def step_finished(self, phase: str, step: int) -> None:
        assert 0 <= step < self.open[phase][-1]
        self._at()

    def phase_finished(self, phase: str) -> None:
        self.open[phase].pop()
        self.num_finished += 1

    def stopping(self) -> None:
        self.was_stopped = True


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as Python starts with, also where the tests were started with it ignored, as by `nohup … &`."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def decoder_inputs(size: int = 16) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens")),
        TensorSpec(name="write_index", dtype="int64", shape=("batch",)),
        TensorSpec(name="past_key.0", dtype="float32", shape=("batch", 2, CAPACITY, size)),
    )


def lowered_graph(folder: Path, graph: Path) -> Path:
    save_lowered(lower(graph, "tensorrt-rtx", "fp16", is_fuser=graph.name.startswith("fuser")), folder / graph.name)
    return folder / graph.name


def build_recorded(
    bundle: Path, name: str, folder: Path, recorder: Recorder | None = None, **options: object
) -> tuple[BuiltEngine, Path]:
    """Build the receiver or sharer 0 of a recorded pair."""
    manifest = read_manifest(bundle)
    record = manifest.receiver_graph if name == "receiver" else manifest.sharers[0].sharer_graph
    assert record is not None
    profiles = decoder_profiles(record.inputs, CAPACITY, SIZES)
    path = lowered_graph(folder, bundle / "graphs" / f"{name}.onnx")
    output = folder / f"{name}.engine"
    engine_options = EngineOptions(profiles, **options)  # type: ignore[arg-type]
    return build_engine(trt, path, output, engine_options, recorder or Recorder()), output


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(("receiver.onnx", "sharer0.onnx")))


# Profiles


def test_decoders_are_built_for_one_prompt_of_any_length_and_for_one_token_of_many_requests():
    profiles = decoder_profiles(decoder_inputs(), CAPACITY, SIZES)
    assert [profile.name for profile in profiles] == ["prefill", "decode"]
    assert profiles[0].shapes == {
        "input_ids": ((1, 1), (1, 100), (1, CAPACITY)),
        "write_index": ((1,), (1,), (1,)),
        "past_key.0": ((1, 2, CAPACITY, 16),) * 3,
    }
    assert profiles[1].shapes == {
        "input_ids": ((1, 1), (2, 1), (8, 1)),
        "write_index": ((1,), (2,), (8,)),
        "past_key.0": ((1, 2, CAPACITY, 16), (2, 2, CAPACITY, 16), (8, 2, CAPACITY, 16)),
    }


def test_fusers_are_built_for_any_number_of_tokens_and_static_inputs_are_left_out():
    inputs = (
        TensorSpec(name="sharer_rows", dtype="int64", shape=("fused_tokens",)),
        TensorSpec(name="write_index", dtype="int64", shape=(1,)),
        TensorSpec(name="unfused_key.0", dtype="float32", shape=(1, 2, "fused_tokens", 16)),
    )
    (profile,) = fuser_profiles(inputs, CAPACITY, SIZES)
    assert profile == ProfileRecord(
        name="fuse",
        shapes={
            "sharer_rows": ((1,), (32,), (CAPACITY,)),
            "unfused_key.0": ((1, 2, 1, 16), (1, 2, 32, 16), (1, 2, CAPACITY, 16)),
        },
    )


# Building


@pytest.mark.xdist_group("qwen3_from_qwen2")
def test_an_engine_is_written_and_its_build_reported(recorded_bundle: Callable[[str], Path], tmp_path: Path):
    recorder = Recorder()
    built, output = build_recorded(recorded_bundle("qwen3_from_qwen2"), "receiver", tmp_path, recorder)
    assert output.stat().st_size == built.num_bytes > 100_000
    assert left_behind(tmp_path) == ["receiver.engine"]
    assert (built.layers.attention, built.layers.cache_updates, built.layers.rotary) == (4, 8, 8)
    assert built.single_attention_kernels
    assert built.cache_aliases["value.3"] == "past_value.3"
    # no TensorFloat-32 in what is kept in float32; what is allocated while running cannot be captured in a CUDA graph.
    assert built.flags == ("REQUIRE_USER_ALLOCATION",)
    assert recorder.num_finished > 3
    assert not any(recorder.open.values())
    assert {parent for parent in recorder.parents.values() if parent is not None} <= recorder.parents.keys()


@pytest.mark.xdist_group("qwen3_from_qwen2")
def test_several_kernels_are_allowed_where_an_attention_has_none_of_its_own(
    recorded_bundle: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The sharer's head size is 12."""
    bundle = recorded_bundle("qwen3_from_qwen2")
    built, _ = build_recorded(bundle, "sharer0", tmp_path)
    assert not built.single_attention_kernels
    assert built.layers.attention == 2
    assert "dedicated kernel" in capfd.readouterr().err
    # Who knows it beforehand is spared the failure.
    built, _ = build_recorded(bundle, "sharer0", tmp_path, single_attention_kernels=False)
    assert not built.single_attention_kernels
    assert "dedicated kernel" not in capfd.readouterr().err


@pytest.mark.xdist_group("qwen3_from_qwen2")
@pytest.mark.parametrize("capabilities", [("7.5",), ("8.9", "12.0")])
def test_one_engine_serves_the_gpus_it_was_built_for(
    capabilities: tuple[str, ...], recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = recorded_bundle("qwen3_from_qwen2")
    built, output = build_recorded(bundle, "receiver", tmp_path, compute_capabilities=capabilities)
    assert output.stat().st_size == built.num_bytes


# Failures


def test_a_failing_build_names_the_graph_the_version_and_the_reason(tmp_path: Path):
    """Head size 12, its projections without biases: TensorRT-RTX 1.7.1 fails a check of its own."""
    path = attention_graph(tmp_path, size=12)
    profiles = decoder_profiles(read_specs(path), CAPACITY, SIZES)
    with pytest.raises(C2CError) as error:
        build_engine(trt, path, tmp_path / "receiver.engine", EngineOptions(profiles), Recorder())
    message = str(error.value)
    assert message.startswith(f"receiver.onnx: tensorrt_rtx {trt.__version__} cannot build this graph")
    assert "MyelinCheckException" in message
    _, cause = message.splitlines()
    assert cause == (
        "Its head size 12 is no multiple of 8, with which TensorRT's compiler fails in some graphs: "
        "run this pair on ort-cpu or ort-cuda"
    )
    assert left_behind(tmp_path) == []


def test_a_profile_that_does_not_fit_is_named(tmp_path: Path):
    path = attention_graph(tmp_path, size=16)
    good = decoder_profiles(read_specs(path), CAPACITY, SIZES)
    swapped = [record.model_copy(update={"shapes": {k: v[::-1] for k, v in record.shapes.items()}}) for record in good]
    with pytest.raises(C2CError, match="profile prefill"):
        build_engine(trt, path, tmp_path / "receiver.engine", EngineOptions(swapped), Recorder())


@pytest.mark.xdist_group("qwen3_from_qwen2")
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_a_build_and_leaves_nothing(recorded_bundle: Callable[[str], Path], tmp_path: Path):
    recorder = Recorder(at=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        build_recorded(recorded_bundle("qwen3_from_qwen2"), "receiver", tmp_path, recorder)
    assert recorder.was_stopped
    assert left_behind(tmp_path) == []


@pytest.mark.xdist_group("qwen3_from_qwen2")
def test_an_engine_that_cannot_be_written_whole_is_not_left_in_part(
    recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = recorded_bundle("qwen3_from_qwen2")
    (tmp_path / "receiver.engine").write_bytes(b"an older engine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1_000_000, limits[1])
    )  # the graph's weights are smaller, the engine larger
    try:
        with pytest.raises(C2CError, match=r"receiver\.engine: cannot be written: File too large"):
            build_recorded(bundle, "receiver", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_behind(tmp_path) == ["receiver.engine"]
    assert (tmp_path / "receiver.engine").read_bytes() == b"an older engine"


def read_specs(path: Path) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype="float16",
            shape=tuple(size if isinstance(size, int) else str(size) for size in value.shape or ()),
        )
        for value in ir.load(path).graph.inputs
    )


def attention_graph(folder: Path, size: int) -> Path:
    """One attention over caches that hidden states are projected to."""
    half, hidden = TensorProto.FLOAT16, 32
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(hidden, HEADS * size)).astype(np.float16) for name in ("wq", "wk", "wv")}
    nodes, heads = [], np.array([0, 0, HEADS, size], np.int64)
    for name in ("q", "k", "v"):
        nodes += [
            helper.make_node("MatMul", ["hidden", f"w{name}"], [f"{name}.flat"]),
            helper.make_node("Reshape", [f"{name}.flat", "heads"], [f"{name}.heads"]),
            helper.make_node("Transpose", [f"{name}.heads"], [name], perm=[0, 2, 1, 3]),
        ]
    for kind in ("key", "value"):
        cache = [f"past_{kind}.0", kind[0], "write_index"]
        nodes.append(helper.make_node("TensorScatter", cache, [f"{kind}.0"], axis=2, mode="linear"))
    nodes.append(helper.make_node("Attention", ["q", "key.0", "value.0", "mask"], ["y"], name="attention", scale=0.25))
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "hidden": (half, ["batch", "tokens", hidden]),
        "past_key.0": (half, ["batch", HEADS, CAPACITY, size]),
        "past_value.0": (half, ["batch", HEADS, CAPACITY, size]),
        "write_index": (TensorProto.INT64, ["batch"]),
        "mask": (TensorProto.BOOL, ["batch", 1, "tokens", CAPACITY]),
    }
    outputs: dict[str, list[int | str]] = {
        "y": ["batch", HEADS, "tokens", size],
        "key.0": ["batch", HEADS, CAPACITY, size],
        "value.0": ["batch", HEADS, CAPACITY, size],
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in shapes.items()],
        [helper.make_tensor_value_info(name, half, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in {**weights, "heads": heads}.items()],
    )
    path = folder / "receiver.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), path)
    return path
