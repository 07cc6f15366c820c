"""`c2c-export build`: every graph of the recorded pairs becomes an engine, and the bundle is whole at any moment."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checked_bundles import context_of
from planted_faults import change_rotary_base, plant, swap_new_rows
from recorded_pairs import each_pair

from c2c_export.build import BuildResult, build
from c2c_export.build_plan import BuildOptions, check_options, plan_build
from c2c_export.bundle import (
    Bundle,
    EngineRecord,
    GpuRecord,
    LayerCounts,
    Manifest,
    ProfileSizes,
    read_manifest,
    write_manifest,
)
from c2c_export.check.level import CheckContext
from c2c_export.check.levels.weights import check_weights
from c2c_export.check.trained.answer import TrainedAnswers
from c2c_export.errors import C2CError, UsageError
from engines.lowering import lower, save_lowered
from engines.machine import probe_module
from engines.ort.engine import OrtCpuEngine
from engines.trt.build import EngineOptions, build_engine, decoder_profiles
from engines.trt.log import error_log
from engines.trt.network import GraphNames, check, expected_layers, parse

trt = pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[2]
PAIR = "qwen3_from_qwen2"
CAPACITY = 256

# A pair with a receiver's graph only, for what does not depend on the graphs.
RECEIVER_ONLY = "gates_closed"

on_receiver_only = pytest.mark.xdist_group(RECEIVER_ONLY)
on_pair = pytest.mark.xdist_group(PAIR)


class Steps:
    """Takes a build's steps and phases; `at` is called with every phase."""

    def __init__(self, at: Callable[[str], None] = lambda phase: None) -> None:
        self.described: list[str] = []
        self._at = at

    def step(self, description: str) -> contextlib.AbstractContextManager[None]:
        self.described.append(description)
        return contextlib.nullcontext()

    def phase_started(self, phase: str, parent: str | None, num_steps: int) -> None:
        self._at(phase)

    def step_finished(self, phase: str, step: int) -> None:
        pass

    def phase_finished(self, phase: str) -> None:
        pass

    def stopping(self) -> None:
        pass


def built(options: BuildOptions, steps: Steps | None = None) -> BuildResult:
    steps = steps or Steps()
    return build(options, steps.step, steps)


def engine_of(bundle: Path, name: str) -> EngineRecord:
    """The engine's record, after every file of the bundle was found unchanged."""
    return Bundle.open(bundle).manifest.engines[name]


def files_of(bundle: Path) -> dict[str, bytes]:
    return {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as Python starts with, also where the tests were started with it ignored, as by `nohup … &`."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def options(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> BuildOptions:
    bundle = Path(shutil.copytree(recorded_bundle(RECEIVER_ONLY), tmp_path / "bundle"))
    return BuildOptions(bundle, "tensorrt-rtx", "fp16", max_batch=4)


@pytest.fixture
def pair_options(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> BuildOptions:
    bundle = Path(shutil.copytree(recorded_bundle(PAIR), tmp_path / "pair"))
    return BuildOptions(bundle, "tensorrt-rtx", "fp16", max_batch=4)


def change(bundle: Path, changed: Callable[[Manifest], Manifest]) -> None:
    write_manifest(bundle, changed(read_manifest(bundle)))


# What is built


@each_pair
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_engines_for_the_cpu_hold_the_trained_weights_and_compute_what_torch_computes_with_them(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = Path(shutil.copytree(recorded_bundle(pair), tmp_path / "bundle"))
    result = built(BuildOptions(bundle, "ort-cpu", precision))
    assert result.record.weights_folder is None
    assert result.record.build is not None
    assert result.record.build.graphs["receiver"].quantized_weights > 0
    context = context_of(bundle, pair, result.name)
    weights = check_weights(context)
    assert weights.passed, weights.divergences
    # Measured: 0.014 to 0.052, which is what rounding the receiver's activations to 8 bits costs.
    assert 0 < mean_logit_error(context, context.held.answers(context)) < 0.065


@on_pair
@pytest.mark.parametrize("fault", [swap_new_rows(1), change_rotary_base(5000.0)], ids=["rows", "rotary base"])
def test_that_comparison_sees_a_fault_that_int4s_rounding_would_hide(
    fault: Callable[[ir.Graph], None], recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = Path(shutil.copytree(recorded_bundle(PAIR), tmp_path / "bundle"))
    built(BuildOptions(bundle, "ort-cpu", "int4"))
    context = context_of(bundle, PAIR, "ort-cpu-int4")
    # What int4 costs against the trained weights.
    assert mean_logit_error(context, context.trained.answers) > 0.2
    answers = context.held.answers(context)
    plant(bundle, "ort-cpu-int4", "receiver", fault)
    assert mean_logit_error(context_of(bundle, PAIR, "ort-cpu-int4"), answers) > 2 * 0.065


def mean_logit_error(context: CheckContext, answers: TrainedAnswers) -> float:
    """Of the engine's logits after the first prompt, by the spread of those that torch computes."""
    found = context.engine.prefill(context.prompts[0])
    expected = answers.prefill(found.plan, context.bundle.manifest.fusion_mode).logits
    return float(np.abs(found.logits - expected).mean() / expected.std())


@on_pair
def test_the_cpus_float_engine_can_be_built_again_and_kept_with_its_weights(pair_options: BuildOptions, tmp_path: Path):
    keep = tmp_path / "kept"
    options = BuildOptions(pair_options.bundle, "ort-cpu", "fp32", keep_onnx=keep)
    assert not built(options).built
    before = Bundle.open(options.bundle).manifest
    assert built(replace(options, rebuild=True)).built
    assert Bundle.open(options.bundle).manifest.files == before.files
    for name in before.graphs:
        # The graph finds its weights beside it.
        OrtCpuEngine(keep / f"{name}.onnx", 1)


@each_pair
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_graph_of_every_pair_is_built(
    pair: str, precision: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = Path(shutil.copytree(recorded_bundle(pair), tmp_path / "bundle"))
    graphs = read_manifest(bundle).engines["ort-cpu-fp32"].graphs
    result = built(BuildOptions(bundle, "tensorrt-rtx", precision))
    assert result.built
    assert result.name == f"tensorrt-rtx-{precision}"
    engine = engine_of(bundle, result.name)
    assert engine == result.record
    assert engine.graphs == {name: f"engines/tensorrt-rtx-{precision}/{name}.engine" for name in graphs}
    assert engine.build is not None
    for name, record in engine.build.graphs.items():
        assert (bundle / engine.graphs[name]).stat().st_size == record.num_bytes
        assert [p.name for p in record.profiles] == (["fuse"] if name.startswith("fuser") else ["prefill", "decode"])
        assert record.quantized_weights == 0
        assert record.layers is not None
        assert record.layers.cache_updates == len(record.cache_aliases)
        # llama_from_gemma3_aligned's receiver has 3 query heads, qwen3_from_qwen2's sharer heads of 12.
        several = (pair, name) in {("llama_from_gemma3_aligned", "receiver"), (PAIR, "sharer0")}
        assert record.single_attention_kernels != several
    on_disk = {p.relative_to(bundle).as_posix() for p in (bundle / "engines" / result.name).iterdir()}
    assert on_disk == set(engine.graphs.values())
    assert [path for path in bundle.iterdir() if path.name.startswith(".")] == []


@on_pair
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_weights_are_built_and_counted(precision: str, pair_options: BuildOptions):
    engine = built(replace(pair_options, precision=precision)).record
    assert engine.build is not None
    assert all(record.quantized_weights > 10 for record in engine.build.graphs.values())


@on_pair
def test_what_an_engine_was_built_from_and_for_is_recorded(pair_options: BuildOptions):
    result = built(replace(pair_options, compute_capabilities=("12.0", "8.9"), prefill_optimum=100, fuse_optimum=50))
    assert result.name == "tensorrt-rtx-fp16-sm89+sm120"
    record = engine_of(pair_options.bundle, result.name).build
    assert record is not None
    assert record.compute_capabilities == ("8.9", "12.0")
    assert record.versions["tensorrt_rtx"] == trt.__version__
    assert record.flags == ("REQUIRE_USER_ALLOCATION",)
    manifest = read_manifest(pair_options.bundle)
    assert record.sources == {path: digest for path, digest in manifest.files.items() if path.startswith("graphs/")}
    prefill, decode = record.graphs["receiver"].profiles
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 100), (1, CAPACITY))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert record.profile_sizes == ProfileSizes(max_batch=4, decode_optimum=1, prefill_optimum=100, fuse_optimum=50)
    assert record.graphs["fuser0"].profiles[0].shapes["sharer_rows"] == ((1,), (50,), (CAPACITY,))


@on_receiver_only
def test_engines_of_several_targets_lie_side_by_side(options: BuildOptions):
    first, second = built(options), built(replace(options, compute_capabilities=("8.9",)))
    engines = Bundle.open(options.bundle).manifest.engines
    assert {first.name, second.name, "ort-cpu-fp32"} == engines.keys()


@on_pair
def test_lowered_graphs_are_kept_where_asked_and_are_what_the_engine_was_built_from(
    pair_options: BuildOptions, tmp_path: Path
):
    keep = tmp_path / "kept" / "here"
    built(replace(pair_options, keep_onnx=keep))
    assert {path.name for path in keep.glob("*.onnx")} == {"receiver.onnx", "sharer0.onnx", "fuser0.onnx"}
    model = ir.load(keep / "receiver.onnx")
    assert {value.dtype for value in model.graph.inputs if "past" in str(value.name)} == {ir.DataType.FLOAT16}
    assert not list(pair_options.bundle.glob("engines/tensorrt-rtx-fp16/*.onnx"))
    # asked for later, they are lowered again, and nothing is built
    later = tmp_path / "later"
    assert not built(replace(pair_options, keep_onnx=later)).built
    assert {path.name: path.read_bytes() for path in later.iterdir()} == {
        path.name: path.read_bytes() for path in keep.iterdir()
    }


@on_receiver_only
def test_a_folder_that_lowered_graphs_cannot_be_kept_in_is_named(options: BuildOptions, tmp_path: Path):
    (tmp_path / "file").write_text("")
    before = files_of(options.bundle)
    with pytest.raises(UsageError, match=r"^--keep-onnx .*/file/kept: cannot be written: Not a directory"):
        built(replace(options, keep_onnx=tmp_path / "file" / "kept"))
    assert files_of(options.bundle) == before


@on_pair
def test_for_onnx_runtime_the_lowered_graphs_are_the_engine(pair_options: BuildOptions):
    engine = built(replace(pair_options, target="ort-cuda", max_batch=None)).record
    model = ir.load(pair_options.bundle / engine.graphs["receiver"])
    assert {value.dtype for value in model.graph.inputs if "past" in str(value.name)} == {ir.DataType.FLOAT16}
    assert "engines/ort-cuda-fp16/receiver.onnx.data" in read_manifest(pair_options.bundle).files


# When it is built again


@on_receiver_only
def test_nothing_is_built_when_nothing_changed(options: BuildOptions):
    first = built(options)
    before = files_of(options.bundle)
    steps = Steps()
    second = built(options, steps)
    assert (second.built, second.record) == (False, first.record)
    assert not any("Building" in step for step in steps.described)
    assert files_of(options.bundle) == before


@on_receiver_only
def test_a_changed_option_graph_or_version_builds_again(options: BuildOptions):
    built(options)
    again = replace(options, max_batch=2)
    assert built(again).built
    assert not built(again).built
    assert built(replace(again, rebuild=True)).built

    def with_another_version(manifest: Manifest) -> Manifest:
        engine = manifest.engines["tensorrt-rtx-fp16"]
        assert engine.build is not None
        record = engine.build.model_copy(update={"versions": {**engine.build.versions, "tensorrt_rtx": "1.0"}})
        changed = engine.model_copy(update={"build": record})
        return manifest.model_copy(update={"engines": {**manifest.engines, "tensorrt-rtx-fp16": changed}})

    change(options.bundle, with_another_version)
    assert built(again).built
    assert engine_of(options.bundle, "tensorrt-rtx-fp16").build is not None


@on_receiver_only
def test_an_engine_of_another_gpu_is_built_again(options: BuildOptions):
    record = built(options).record
    plan = plan_build(options, check_options(options), Bundle.open(options.bundle))
    assert plan.equals(record)
    assert not replace(plan, gpu=GpuRecord(name="NVIDIA H100", compute_capability="9.0")).equals(record)


@on_receiver_only
def test_builds_at_the_same_time_all_stay_in_the_manifest(options: BuildOptions):
    wanted = [replace(options, precision=precision) for precision in ("fp16", "bf16", "int8")]
    script = (
        "import sys, contextlib; from pathlib import Path; from c2c_export.build import build\n"
        "from c2c_export.build_plan import BuildOptions; from c2c_export.progress import BuildDisplay\n"
        "from rich.console import Console\n"
        "with BuildDisplay(Console(stderr=True)) as display:\n"
        "    build(BuildOptions(Path(sys.argv[1]), 'tensorrt-rtx', sys.argv[2]), display.step, display)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(one.bundle), one.precision], cwd=ROOT) for one in wanted
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    engines = Bundle.open(options.bundle).manifest.engines
    assert engines.keys() == {"ort-cpu-fp32", *(f"tensorrt-rtx-{one.precision}" for one in wanted)}


# What is refused


def with_receiver(**fields: object) -> Callable[[Manifest], Manifest]:
    return lambda manifest: manifest.model_copy(update={"receiver": manifest.receiver.model_copy(update=fields)})


@on_receiver_only
@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"precision": "fp32"}, r"^precision fp32: tensorrt-rtx takes fp16 or bf16 .*its attention has no fp32 kernel"),
        ({"precision": "fp8"}, r"^precision 'fp8': expected one of fp16, bf16, int8, int4"),
        (
            {"target": "tensorrt_rtx"},
            r"^engine 'tensorrt_rtx': expected one of ort-cpu, ort-cuda, tensorrt, tensorrt-rtx",
        ),
        (
            {"target": "ort-cpu", "max_batch": None},
            r"^precision fp16: ort-cpu takes fp32 or int8 or int4; a CPU computes in fp32",
        ),
        ({"target": "ort-cpu", "precision": "int4", "max_batch": 2}, r"^--max-batch 2: ort-cpu has no profiles"),
        ({"target": "ort-cuda", "precision": "fp32"}, r"^ort-cuda in fp32 runs the portable graphs as they are"),
        ({"compute_capabilities": ("9.0",)}, r"^compute capability 9\.0: tensorrt-rtx \S+ builds for 7\.5, 8\.0,"),
        ({"compute_capabilities": ("89",)}, r"^compute capability '89': expected two numbers with a dot, such as 8\.9"),
        (
            {"compute_capabilities": ("7.5",), "precision": "bf16"},
            r"^compute capability 7\.5: it has no bf16 kernels, they begin at 8\.0; build for it in fp16",
        ),
        (
            {"target": "tensorrt", "compute_capabilities": ("8.9",)},
            r"^compute capability 8\.9: tensorrt builds for the GPU of this machine only",
        ),
        ({"max_batch": 0}, r"^--max-batch 0: expected at least 1"),
        ({"prefill_optimum": 257}, r"^--prefill-optimum 257: expected 1 to 256, the bundle's capacity"),
        ({"fuse_optimum": 0}, r"^--fuse-optimum 0: expected at least 1"),
        ({"decode_optimum": 5}, r"^--decode-optimum 5: expected 1 to 4, --max-batch"),
        ({"target": "ort-cuda", "max_batch": 4}, r"^--max-batch 4: ort-cuda has no profiles"),
        ({"timing_cache": Path("cache")}, r"^--timing-cache: tensorrt-rtx times no kernels"),
    ],
)
def test_what_a_target_cannot_do_is_refused_before_any_work(
    changes: dict[str, object], pattern: str, options: BuildOptions
):
    before = files_of(options.bundle)
    steps = Steps()
    with pytest.raises(UsageError, match=pattern) as error:
        built(replace(options, **changes), steps)  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) <= 2
    assert not any("Lowering" in step for step in steps.described)
    assert files_of(options.bundle) == before


@on_receiver_only
@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        (with_receiver(head_dim=1026), r"receiver \(Qwen3ForCausalLM\): head size 1026: tensorrt-rtx takes even head"),
        (
            with_receiver(head_dim=17),
            r"receiver \(Qwen3ForCausalLM\): head size 17: tensorrt-rtx takes even head sizes",
        ),
        (
            lambda manifest: manifest.model_copy(update={"max_length": 200_000}),
            r"capacity 200000: tensorrt-rtx takes up to 131072 rows, .* export with a smaller --max-length",
        ),
    ],
)
def test_a_model_that_a_target_cannot_hold_is_refused_by_name(
    changed: Callable[[Manifest], Manifest], pattern: str, options: BuildOptions
):
    change(options.bundle, changed)
    with pytest.raises(UsageError, match=pattern):
        built(options)


@on_receiver_only
@pytest.mark.skipif(probe_module("tensorrt").version is not None, reason="tensorrt is installed")
def test_tensorrt_without_its_module_is_refused_with_how_to_install_it(options: BuildOptions):
    with pytest.raises(
        C2CError, match=r"^tensorrt cannot be built here: the module tensorrt is not installed;"
    ) as error:
        built(replace(options, target="tensorrt"))
    assert "pip install -c constraints.txt '.[tensorrt]'" in str(error.value)
    assert "--engine tensorrt-rtx builds on any machine" in str(error.value)


@on_receiver_only
@pytest.mark.parametrize("inside", ["graphs", "engines/tensorrt-rtx-fp16", "new"])
def test_lowered_graphs_are_not_kept_inside_the_bundle(inside: str, options: BuildOptions):
    before = files_of(options.bundle)
    with pytest.raises(UsageError, match=r"lies in the bundle; choose a folder outside of it"):
        built(replace(options, keep_onnx=options.bundle / ".." / options.bundle.name / inside))
    assert files_of(options.bundle) == before


@on_receiver_only
def test_more_requests_than_a_cache_can_hold_are_refused_with_how_many_it_can(options: BuildOptions):
    # 2 heads of 16 elements, 256 rows
    with pytest.raises(UsageError, match=r"^--max-batch 1000000: .* which is 262143 requests of receiver's 8192"):
        built(replace(options, max_batch=1_000_000))


@on_receiver_only
def test_a_damaged_engine_is_built_again(options: BuildOptions):
    first = built(options)
    engine = options.bundle / first.record.graphs["receiver"]
    good = engine.read_bytes()
    for damage in (lambda: engine.write_bytes(good[:-1]), engine.unlink):
        damage()
        with pytest.raises(C2CError, match=r"receiver\.engine: .*; build that engine again with .* --rebuild"):
            Bundle.open(options.bundle)
        assert built(options).built
        assert Bundle.open(options.bundle).manifest.engines.keys() == {"ort-cpu-fp32", first.name}


@on_receiver_only
def test_a_damaged_bundle_is_refused_by_file(options: BuildOptions):
    (options.bundle / "graphs" / "receiver.onnx").write_bytes(b"")
    with pytest.raises(C2CError, match=r"graphs/receiver\.onnx: changed since the bundle was written"):
        built(options)


# What a failure leaves


@on_receiver_only
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("phase", ["Building engine", "Optimizing graph"])
def test_an_interrupted_build_leaves_the_bundle_as_it_was(phase: str, options: BuildOptions):
    before = files_of(options.bundle)

    def interrupt(started: str) -> None:
        if started == phase:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        built(options, Steps(at=interrupt))
    assert files_of(options.bundle) == before
    Bundle.open(options.bundle)
    assert built(options).built


@on_receiver_only
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_rebuild_keeps_the_engine_that_is_there(options: BuildOptions):
    built(options)
    before = files_of(options.bundle)
    with pytest.raises(KeyboardInterrupt):
        built(replace(options, max_batch=2), Steps(at=lambda _: signal.raise_signal(signal.SIGINT)))
    assert files_of(options.bundle) == before


@on_receiver_only
@pytest.mark.parametrize(("spare", "moment"), [(64, "takes about"), (24 * 1024, "needs")])
def test_a_full_disk_is_named_and_leaves_the_bundle_as_it_was(
    spare: int, moment: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    """Too little from the beginning, or since something else took what was there; `spare` in KiB."""
    if os.geteuid():
        pytest.skip("needs root, to mount a tiny disk")
    source = recorded_bundle(RECEIVER_ONLY)
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in source.rglob("*") if path.is_file()) + 64
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={used + spare}k"

    def fill(phase: str) -> None:
        other = disk / "other"
        if phase == "Building engine" and not other.exists():
            other.write_bytes(bytes(shutil.disk_usage(disk).free - 4096))

    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        bundle = Path(shutil.copytree(source, disk / "bundle"))
        before = files_of(bundle)
        with pytest.raises(C2CError, match=f"the disk is full: .*{moment}.* MB are free"):
            built(BuildOptions(bundle, "tensorrt-rtx", "fp16"), Steps(at=fill))
        assert files_of(bundle) == before
        assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # a graph may still be mapped


# The command


@on_pair
def test_the_command_builds_and_inspect_shows_it(pair_options: BuildOptions):
    bundle = pair_options.bundle

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from c2c_export.cli import main; main()", *map(str, arguments)]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    arguments = ("build", bundle, "--engine", "tensorrt-rtx", "--max-batch", 3, "--compute-capability", "8.9")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Built tensorrt-rtx-fp16-sm89" in done.stderr
    for graph in ("receiver", "sharer0", "fuser0"):
        assert f"Building {graph} with tensorrt-rtx" in done.stderr
    again = run(*arguments)
    assert "is there already and nothing changed" in again.stderr
    shown = run("inspect", bundle).stdout
    for text in (
        "tensorrt-rtx-fp16-sm89",
        "4 attention",
        "8 cache updates",
        "8 rotary",
        "prefill [1,1] … [1,256], [1,256]",
    ):
        assert text in shown, text
    assert "decode [1,1] … [3,1], [1,1]" in shown
    assert "2 attention, of several kernels" in shown
    refused = run("build", bundle, "--engine", "tensorrt-rtx", "--precision", "fp32")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: precision fp32")


@on_receiver_only
@pytest.mark.parametrize(("target", "precision"), [("tensorrt-rtx", "fp16"), ("ort-cpu", "int4")])
def test_building_needs_neither_torch_nor_transformers(target: str, precision: str, options: BuildOptions):
    script = (
        "import sys, contextlib; from pathlib import Path; from c2c_export.build import build\n"
        "from c2c_export.build_plan import BuildOptions\n"
        "from c2c_export.progress import BuildDisplay; from rich.console import Console\n"
        "with BuildDisplay(Console(stderr=True)) as display:\n"
        "    build(BuildOptions(Path(sys.argv[1]), *sys.argv[2:]), display.step, display)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(options.bundle), target, precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


# A real pair


REAL = {
    # SmolLM2-135M: 30 layers; Gemma-3-270M: 18, of the last one its keys and values alone.
    "receiver": LayerCounts(attention=30, cache_updates=60, rotary=60, total=0),
    "sharer0": LayerCounts(attention=17, cache_updates=36, rotary=35, total=0),
}


@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize("name", REAL)
def test_a_real_decoder_is_built_in_fp16(name: str, demo_bundle: Path, tmp_path: Path):
    manifest = read_manifest(demo_bundle)
    graph = manifest.receiver_graph if name == "receiver" else manifest.sharers[0].sharer_graph
    assert graph is not None
    lowered = tmp_path / f"{name}.onnx"
    save_lowered(lower(demo_bundle / graph.path, "tensorrt-rtx", "fp16", is_fuser=False), lowered)
    sizes = ProfileSizes(max_batch=8, decode_optimum=1, prefill_optimum=128, fuse_optimum=128)
    profiles = decoder_profiles(graph.inputs, manifest.max_length, sizes)
    engine = build_engine(trt, lowered, tmp_path / "engine", EngineOptions(profiles), Steps())
    assert engine.layers.model_copy(update={"total": 0}) == REAL[name]
    assert len(engine.cache_aliases) == REAL[name].cache_updates
    assert engine.single_attention_kernels
    # half of the float32 graph, and the kernels
    assert 0.5 <= engine.num_bytes / graph.num_bytes < 0.6


@pytest.mark.xdist_group("demo")
def test_a_real_fuser_is_parsed_with_every_input_used_and_every_cache_in_place(demo_bundle: Path, tmp_path: Path):
    """Building it takes minutes; docs/architecture.md has what was measured."""
    graph = read_manifest(demo_bundle).sharers[0].fuser_graph
    assert graph is not None
    lowered = tmp_path / "fuser.onnx"
    fuser = lower(demo_bundle / graph.path, "tensorrt-rtx", "fp16", is_fuser=True)
    save_lowered(fuser, lowered)
    log = error_log(trt)
    parsed = parse(trt, trt.Builder(log), log, lowered, GraphNames(fuser.model))
    found = check(trt, parsed.network, expected_layers(fuser.model), lowered.name)
    assert (found.attention, found.cache_updates, found.rotary) == (0, 60, 0)
