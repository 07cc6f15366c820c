"""Which engine is run: the best that can be, with its reason; one asked for by name, or an error, but never another."""

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from c2c_export.bundle import BuildRecord, Bundle, EngineRecord, GpuRecord
from c2c_export.errors import C2CError, UsageError
from engines.machine import CUDA_PROVIDER, CUDA_PYTHON, Gpu, Machine, Module, OnnxRuntime
from engines.obstacles import build_obstacle, record_obstacle, run_obstacle
from engines.select import EngineChoice, load_engine, new_device, open_engine
from engines.targets import TARGETS
from engines.trt.header import header_problem, meaning_of
from runtime import C2CPipeline

NAME = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(NAME)

ADA, HOPPER, TURING = Gpu("RTX 4090", "8.9", 24 << 30), Gpu("H100", "9.0", 80 << 30), Gpu("T4", "7.5", 16 << 30)
CPU_RUNTIME = OnnxRuntime({"onnxruntime": "1.32.0"}, None, ("CPUExecutionProvider",))
GPU_RUNTIME = OnnxRuntime({"onnxruntime-gpu": "1.31.1"}, None, (CUDA_PROVIDER, "CPUExecutionProvider"))
ABSENT = Module(None, "not installed")


def machine(
    *gpus: Gpu,
    tensorrt: str | None = None,
    rtx: str | None = "1.7.1.116",
    onnx_runtime: OnnxRuntime = CPU_RUNTIME,
    cuda_problem: str | None = None,
) -> Machine:
    """A description of a machine; nothing of it is here."""
    modules = {
        "tensorrt": Module(tensorrt) if tensorrt else ABSENT,
        "tensorrt_rtx": Module(rtx) if rtx else ABSENT,
        "onnxruntime": Module("1.32.0"),
        CUDA_PYTHON: Module("13.4.4"),
        "onnx": Module("1.23.2"),
        "onnx_ir": Module("1.1.0"),
        "onnxscript": Module("0.7.2"),
    }
    return Machine(gpus, cuda_problem or (None if gpus else "no GPU: no NVIDIA driver"), None, modules, onnx_runtime)


def built(
    target: str,
    precision: str,
    capabilities: tuple[str, ...] = (),
    version: str | None = None,
    gpu: GpuRecord | None = None,
) -> EngineRecord:
    build = BuildRecord(
        compute_capabilities=capabilities,
        gpu=gpu,
        profile_sizes=None,
        flags=(),
        versions={TARGETS[target].module: version} if version else {},
        sources={},
        graphs={},
    )
    return EngineRecord(target=target, precision=precision, graphs={"receiver": "no/such.engine"}, build=build)


@pytest.fixture
def bundle_with(recorded_bundle: Callable[[str], Path]) -> Callable[..., Bundle]:
    """The recorded bundle, with these engines in its manifest besides its own."""
    opened = Bundle.open(recorded_bundle(NAME))

    def with_engines(*records: EngineRecord) -> Bundle:
        more = {f"{record.target}-{record.precision}": record for record in records}
        manifest = opened.manifest.model_copy(update={"engines": {**opened.manifest.engines, **more}})
        return Bundle(opened.root, manifest)

    return with_engines


def seen_as(found: Machine) -> Callable[[Iterable[str]], Machine]:
    return lambda modules: found


def unseen(modules: Iterable[str]) -> Machine:
    raise AssertionError("an engine on the CPU needs no look at the machine")


def choose_engine(
    bundle: Bundle,
    engine: str = "ort-cpu",
    precision: str | None = None,
    *,
    probe: Callable[[Iterable[str]], Machine],
) -> EngineChoice:
    """What is opened where everything that can run can be loaded."""
    return open_engine(bundle, engine, precision, lambda record: None, probe=probe)[0]


def chosen(bundle: Bundle, found: Machine, engine: str = "auto", precision: str | None = None) -> tuple[str, str]:
    choice = choose_engine(bundle, engine, precision, probe=seen_as(found))
    return choice.target, choice.precision


BundleWith = Callable[..., Bundle]

# Of tensorrt's engines no header is read, so their files need not be here.
TENSORRT = [built("tensorrt", precision, version="11.4.0") for precision in ("fp16", "bf16", "int4")]


def tensorrt_machine(*gpus: Gpu, version: str = "11.4.0", onnx_runtime: OnnxRuntime = CPU_RUNTIME) -> Machine:
    return machine(*gpus, tensorrt=version, onnx_runtime=onnx_runtime)


def test_auto_takes_the_cpu_where_nothing_else_runs_and_says_why(bundle_with: BundleWith):
    choice = choose_engine(bundle_with(built("tensorrt-rtx", "fp16")), "auto", probe=seen_as(machine()))
    assert (choice.target, choice.precision) == ("ort-cpu", "fp32")
    assert choice.reason.startswith("ort-cpu in fp32, as what would be better cannot run here: ")
    assert "tensorrt-rtx in fp16: no GPU: no NVIDIA driver" in choice.reason
    assert "ort-cuda in fp32: onnxruntime 1.32.0 offers no CUDAExecutionProvider" in choice.reason
    assert "scripts/install_gpu.sh" in choice.reason


def test_auto_prefers_tensorrt_then_the_cuda_provider_then_the_cpu(bundle_with: BundleWith):
    both = bundle_with(*TENSORRT)
    assert chosen(both, tensorrt_machine(ADA, onnx_runtime=GPU_RUNTIME)) == ("tensorrt", "fp16")
    assert chosen(both, machine(ADA, onnx_runtime=GPU_RUNTIME)) == ("ort-cuda", "fp32")
    assert chosen(both, machine(ADA)) == ("ort-cpu", "fp32")
    assert chosen(bundle_with(), tensorrt_machine(ADA, onnx_runtime=GPU_RUNTIME)) == ("ort-cuda", "fp32")


def test_auto_takes_quantised_weights_only_when_nothing_else_runs_on_the_gpu(bundle_with: BundleWith):
    int4 = bundle_with(TENSORRT[2])
    assert chosen(int4, tensorrt_machine(ADA, onnx_runtime=GPU_RUNTIME)) == ("ort-cuda", "fp32")
    assert chosen(int4, tensorrt_machine(ADA)) == ("tensorrt", "int4")


def test_engine_and_precision_may_be_left_open_one_by_one(bundle_with: BundleWith):
    bundle, found = bundle_with(*TENSORRT), tensorrt_machine(ADA, onnx_runtime=GPU_RUNTIME)
    assert chosen(bundle, found, "tensorrt", "auto") == ("tensorrt", "fp16")
    assert chosen(bundle, found, "auto", "bf16") == ("tensorrt", "bf16")
    assert chosen(bundle, found, "auto", "fp32") == ("ort-cuda", "fp32")
    assert chosen(bundle, found, "auto", "auto") == ("tensorrt", "fp16")
    assert chosen(bundle, found, "tensorrt", "int4") == ("tensorrt", "int4")


def test_the_cpus_engine_is_chosen_without_a_look_at_the_machine(bundle_with: BundleWith):
    for precision in (None, "fp32", "auto"):
        choice = choose_engine(bundle_with(*TENSORRT), "ort-cpu", precision, probe=unseen)
        assert (choice.target, choice.precision) == ("ort-cpu", "fp32")


def test_the_reason_names_what_was_chosen(bundle_with: BundleWith):
    found = tensorrt_machine(ADA, onnx_runtime=GPU_RUNTIME)
    assert choose_engine(bundle_with(), probe=unseen).reason == "ort-cpu in fp32, as asked for"
    # fp16, bf16 and int4 of tensorrt, the portable graphs on both devices
    best = choose_engine(bundle_with(*TENSORRT), "auto", probe=seen_as(found))
    assert best.reason == "tensorrt in fp16, the best of 5 that were left open"


@pytest.mark.parametrize(
    ("engine", "precision", "found", "message"),
    [
        ("tensorrt-rtx", "fp16", machine(), "no GPU: no NVIDIA driver"),
        ("tensorrt-rtx", "fp16", machine(ADA, rtx=None), r"the module tensorrt_rtx is not installed; .*pip install"),
        ("tensorrt-rtx", "fp16", machine(HOPPER), r"H100 has compute capability 9\.0; tensorrt-rtx serves 7\.5, 8\.0"),
        ("tensorrt-rtx", "bf16", machine(TURING), r"T4 has compute capability 7\.5; kernels in bf16 begin at 8\.0"),
        ("tensorrt-rtx", "fp16", machine(ADA, cuda_problem="the driver is too old"), "the driver is too old"),
        ("ort-cuda", None, machine(ADA), r"no CUDAExecutionProvider; .*bash scripts/install_gpu\.sh"),
        ("ort-cuda", None, machine(onnx_runtime=GPU_RUNTIME), "no GPU"),
    ],
)
def test_an_engine_asked_for_by_name_is_never_replaced(
    bundle_with: BundleWith, engine: str, precision: str | None, found: Machine, message: str
):
    bundle = bundle_with(built("tensorrt-rtx", "fp16"), built("tensorrt-rtx", "bf16"))
    with pytest.raises(C2CError, match=message) as error:
        choose_engine(bundle, engine, precision, probe=seen_as(found))
    assert error.value.exit_code == 1
    assert str(bundle.root) in str(error.value)


def test_an_engine_that_the_bundle_lacks_is_a_wrong_use_with_those_it_has(bundle_with: BundleWith):
    for engine, precision in (("tensorrt-rtx", "fp16"), ("ort-cpu", "int8"), ("auto", "int8"), ("nonsense", None)):
        with pytest.raises(UsageError, match="it has ort-cpu-fp32, tensorrt-bf16, ort-cuda-fp32"):
            choose_engine(bundle_with(TENSORRT[1]), engine, precision, probe=unseen)


def test_an_engine_of_another_version_or_gpu_is_refused_with_both_and_what_to_do():
    target, found = TARGETS["tensorrt-rtx"], machine(ADA)
    assert record_obstacle(built("tensorrt-rtx", "fp16", ("8.6", "8.9"), "1.7.1.116"), target, found) is None
    assert record_obstacle(built("tensorrt-rtx", "fp16"), target, found) is None
    other = record_obstacle(built("tensorrt-rtx", "fp16", version="1.6.0.1"), target, found)
    assert other is not None
    assert "built with tensorrt_rtx 1.6.0.1, 1.7.1.116 is installed" in other
    assert "c2c-export build BUNDLE --engine tensorrt-rtx --precision fp16" in other
    gpu = record_obstacle(built("tensorrt-rtx", "fp16", ("12.0",), "1.7.1.116"), target, found)
    assert gpu is not None
    assert "built for compute capability 12.0, RTX 4090 has 8.9" in gpu
    assert gpu.endswith("--compute-capability 8.9")
    default = record_obstacle(built("tensorrt-rtx", "fp16", version="1.7.1.116"), target, machine(TURING))
    assert default is not None
    assert "built for compute capability 8.0, 8.6, 8.9, 12.0, 12.1, T4 has 7.5" in default


def test_an_engine_of_tensorrt_runs_on_the_gpu_that_it_was_built_on_alone():
    target, version = TARGETS["tensorrt"], "11.4.0"
    built_on = GpuRecord(name=ADA.name, compute_capability=ADA.compute_capability)
    record = built("tensorrt", "fp16", version=version, gpu=built_on)
    assert record_obstacle(record, target, tensorrt_machine(ADA, HOPPER)) is None
    other = record_obstacle(record, target, tensorrt_machine(HOPPER, ADA))  # the first GPU is the one that is used
    assert other is not None
    assert "built on RTX 4090 (compute capability 8.9)" in other
    assert "this machine's is H100 (9.0)" in other
    assert other.endswith("c2c-export build BUNDLE --engine tensorrt --precision fp16 on this machine")
    same_name = Gpu(ADA.name, "9.0", ADA.memory_bytes)
    assert "RTX 4090 (9.0)" in str(record_obstacle(record, target, tensorrt_machine(same_name)))


def test_what_a_target_needs_to_build():
    rtx, tensorrt, cuda, cpu = (TARGETS[name] for name in ("tensorrt-rtx", "tensorrt", "ort-cuda", "ort-cpu"))
    assert build_obstacle(cpu, machine()) is None
    assert build_obstacle(cuda, machine()) is None
    assert build_obstacle(rtx, machine()) is None  # needs no GPU
    assert "not installed" in str(build_obstacle(tensorrt, machine(ADA)))
    assert "no GPU" in str(build_obstacle(tensorrt, machine(tensorrt="11.4.0")))
    assert build_obstacle(tensorrt, machine(HOPPER, tensorrt="11.4.0")) is None
    old = machine(TURING, tensorrt="11.4.0")
    assert build_obstacle(tensorrt, old, "fp16") is None
    assert "T4 has compute capability 7.5; kernels in bf16 begin at 8.0" in str(build_obstacle(tensorrt, old, "bf16"))
    assert build_obstacle(rtx, old, "bf16") is None  # built for other GPUs than this one's
    bare = machine(ADA)
    bare.modules["onnx_ir"] = ABSENT
    assert "'.[tensorrt-rtx]'" in str(build_obstacle(rtx, bare))


def test_a_broken_onnx_runtime_is_an_obstacle_to_both_of_its_targets():
    both = OnnxRuntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}, "both are installed", (CUDA_PROVIDER,))
    for name in ("ort-cpu", "ort-cuda"):
        assert run_obstacle(TARGETS[name], machine(ADA, onnx_runtime=both)) == "onnxruntime: both are installed"


# What cannot be loaded


class Held:
    """What a load holds before it fails; counted while it is alive."""

    alive = 0

    def __init__(self) -> None:
        Held.alive += 1
        self.cycle = self
        weakref.finalize(self, Held.gone)

    @classmethod
    def gone(cls) -> None:
        cls.alive -= 1


def failing_load(*failing: str) -> Callable[[EngineRecord], str]:
    def load(record: EngineRecord) -> str:
        assert Held.alive == 0, "what the failed attempt held is still there"
        held = Held()
        if record.target in failing:
            raise C2CError(f"too little memory for {record.target}\nfree some")
        return f"{record.target} {type(held).__name__}"

    return load


def test_auto_goes_on_when_loading_fails_frees_what_was_held_and_says_why(bundle_with: BundleWith):
    found = tensorrt_machine(ADA, onnx_runtime=GPU_RUNTIME)
    load = failing_load("tensorrt", "ort-cuda")
    choice, loaded = open_engine(bundle_with(TENSORRT[0]), "auto", None, load, probe=seen_as(found))
    assert loaded == "ort-cpu Held"
    assert choice.reason == (
        "ort-cpu in fp32, as what would be better cannot run here: "
        "tensorrt in fp16: too little memory for tensorrt free some; "
        "ort-cuda in fp32: too little memory for ort-cuda free some"
    )


def test_an_open_precision_goes_on_to_the_next_of_the_same_engine(bundle_with: BundleWith):
    def load(record: EngineRecord) -> str:
        if record.precision == "fp16":
            raise C2CError("no fp16")
        return record.precision

    choice, loaded = open_engine(bundle_with(*TENSORRT), "tensorrt", "auto", load, probe=seen_as(tensorrt_machine(ADA)))
    assert (choice.target, choice.precision, loaded) == ("tensorrt", "bf16", "bf16")
    assert "tensorrt in fp16: no fp16" in choice.reason


def test_a_named_engine_that_cannot_be_loaded_is_an_error_and_so_is_none_left(bundle_with: BundleWith):
    found = seen_as(tensorrt_machine(ADA))
    bundle = bundle_with(TENSORRT[0])
    with pytest.raises(C2CError, match=r"^too little memory for tensorrt\nfree some$"):
        open_engine(bundle, "tensorrt", "fp16", failing_load("tensorrt", "ort-cpu"), probe=found)
    gc.collect()
    pattern = r"no engine .* can run here: tensorrt in fp16: too little .* free some; .*ort-cpu in fp32: too little"
    with pytest.raises(C2CError, match=pattern):
        open_engine(bundle, "auto", None, failing_load("tensorrt", "ort-cpu"), probe=found)


def test_an_error_that_is_not_the_users_is_not_hidden_by_another_engine(bundle_with: BundleWith):
    def load(record: EngineRecord) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        open_engine(bundle_with(), "auto", None, load, probe=seen_as(machine()))


# What is really here


def test_a_pipeline_says_what_it_runs_and_why(
    recorded_bundle: Callable[[str], Path], recorded_pipeline: Callable[[str], C2CPipeline]
):
    automatic = C2CPipeline.from_bundle(recorded_bundle(NAME), "auto", num_slots=1, num_threads=1)
    named = recorded_pipeline(NAME)
    assert named.engine_choice.reason == "ort-cpu in fp32, as asked for"
    if automatic.engine_choice.target != "ort-cpu":
        pytest.skip("this machine has a GPU")
    assert "ort-cuda in fp32: " in automatic.engine_choice.reason
    options = {"max_new_tokens": 4, "ignore_eos": True}
    assert automatic.generate("Why?", **options).token_ids == named.generate("Why?", **options).token_ids


def test_the_cuda_provider_by_name_is_refused_here(recorded_bundle: Callable[[str], Path]):
    import onnxruntime

    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime's GPU build is installed")
    with pytest.raises(C2CError, match=r"scripts/install_gpu\.sh"):
        C2CPipeline.from_bundle(recorded_bundle(NAME), "ort-cuda")


def test_a_device_and_an_engine_of_the_cpu_need_no_gpu(recorded_bundle: Callable[[str], Path]):
    device = new_device("ort-cpu")
    path = Bundle.open(recorded_bundle(NAME)).file("graphs/receiver.onnx")
    assert load_engine("ort-cpu", path, device, 1).device is device


def test_the_header_of_an_engine_is_judged_by_tensorrt(tmp_path: Path):
    trt = pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "receiver.engine"
    path.write_bytes(b"no engine at all" * 16)
    assert header_problem(path, trt) == "it is damaged, or no engine of TensorRT for RTX"


def test_every_flag_of_tensorrt_has_a_meaning():
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name: int(flag) for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()}
    for name, flag in known.items():
        assert meaning_of(flag, known) != name.lower().replace("_", " "), name
    assert meaning_of(known["VERSION_MISMATCH"] | known["UNSUPPORTED_CC"], known) == (
        "it was built with another version of TensorRT for RTX, it was not built for this GPU's compute capability"
    )
    assert meaning_of(0, known) == "TensorRT finds it invalid here and gives no reason"
