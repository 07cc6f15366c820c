"""The command `bench`: every number is there, positive, and follows from the others; wrong use is refused."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import RunCli

from c2c_export.bench import measure, run
from c2c_export.bench.batch import check_batches
from c2c_export.bench.prompts import make_prompt
from c2c_export.bench.report import BenchReport, PhaseTimes
from c2c_export.build import build
from c2c_export.build_plan import BuildOptions
from c2c_export.errors import C2CError, UsageError
from runtime import C2CPipeline

UNALIGNED, ALIGNED, TWO_SHARERS = "qwen3_from_qwen2", "qwen3_from_llama_aligned", "two_sharers_parallel"
CLOSED = "gates_closed"
GOLDEN = Path(__file__).parents[2] / "golden"

BundleOf = Callable[[str], Path]


@pytest.fixture
def run_bench(run_cli: RunCli) -> RunCli:
    """Run `c2c-export bench` in this process: exit code, stdout, stderr."""
    return lambda *arguments: run_cli("bench", *arguments)


@pytest.fixture
def bench(run_bench: RunCli, tmp_path: Path) -> Callable[..., BenchReport]:
    """Run a small benchmark on one thread; its report, read back from the JSON."""

    def run(*arguments: object) -> BenchReport:
        path = tmp_path / "report.json"
        small = ("--threads", 1, "--new-tokens", 4, "--repeats", 2, "--json", path)
        code, _, err = run_bench(*arguments, *small)
        assert code == 0, err
        assert list(tmp_path.glob(".*")) == []  # written beside, then renamed
        return BenchReport.model_validate_json(path.read_text())

    return run


@pytest.fixture
def empty_checkout(tmp_path: Path) -> Path:
    """What is taken for a checkout of the research code, without any code."""
    wrapper = tmp_path / "rosetta" / "model" / "wrapper.py"
    wrapper.parent.mkdir(parents=True)
    wrapper.touch()
    return tmp_path


def check_phases(times: PhaseTimes) -> None:
    assert times.ttft > 0
    assert times.receiver_prefill > 0
    assert times.decode_ms_per_token > 0
    assert times.ttft_range[0] <= times.ttft <= times.ttft_range[1]
    assert times.decode_ms_quartiles[0] <= times.decode_ms_per_token <= times.decode_ms_quartiles[1]
    assert times.tokens_per_second == pytest.approx(1000 / times.decode_ms_per_token)


# Reports


@pytest.mark.xdist_group(UNALIGNED)
def test_prompts_and_batches_are_all_measured(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    lengths, batches = ("--prompt-tokens", 20, "--prompt-tokens", 33), ("--batch", 1, "--batch", 3)
    report = bench(recorded_bundle(UNALIGNED), *lengths, *batches)
    assert report.settings.prompt_tokens == (20, 33)
    assert [prompt.receiver_tokens for prompt in report.prompts] == [20, 33]
    for prompt in report.prompts:
        # All but the last token are fused, and the sharer reads no more.
        assert prompt.fused_tokens == prompt.receiver_tokens - 1
        assert prompt.sharer_tokens == {0: prompt.fused_tokens}
        check_phases(prompt.c2c)
        check_phases(prompt.receiver_alone)
        assert prompt.c2c.sharer_prefill > 0
        assert prompt.c2c.fuse > 0
        assert prompt.receiver_alone.sharer_prefill == prompt.receiver_alone.fuse == 0
    assert [(record.asked_tokens, record.batch) for record in report.batches] == [(20, 1), (20, 3), (33, 1), (33, 3)]
    for record in report.batches:
        assert record.ms_per_step > 0
        assert record.tokens_per_second == pytest.approx(1000 * record.batch / record.ms_per_step)
    assert report.machine.threads == 1
    assert (report.bundle.engine, report.bundle.precision, report.bundle.aligned) == ("ort-cpu", "fp32", False)
    assert report.text_to_text is report.roofline is report.reference is None


@pytest.mark.xdist_group(UNALIGNED)
def test_every_number_of_requests_has_a_pipeline_of_its_own(
    bench: Callable[..., BenchReport], recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch
):
    opened: list[tuple[int, weakref.ref[C2CPipeline]]] = []
    from_bundle = C2CPipeline.from_bundle

    def count(*arguments: Any, num_slots: int, **named: Any) -> C2CPipeline:
        # Memory that a larger one took would count for the smaller.
        assert [slots for slots, pipeline in opened if pipeline() is not None] == []
        pipeline = from_bundle(*arguments, num_slots=num_slots, **named)
        opened.append((num_slots, weakref.ref(pipeline)))
        return pipeline

    monkeypatch.setattr(C2CPipeline, "from_bundle", count)
    report = bench(recorded_bundle(UNALIGNED), "--prompt-tokens", 8, "--batch", 3, "--batch", 1)
    assert [slots for slots, _ in opened] == [1, 1, 3]
    assert [record.batch for record in report.batches] == [1, 3]


@pytest.mark.xdist_group(UNALIGNED)
def test_prompts_are_measured_the_shortest_first(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    # Rows that a longer one had written stay in memory.
    report = bench(recorded_bundle(UNALIGNED), "--prompt-tokens", 33, "--prompt-tokens", 20, "--prompt-tokens", 33)
    assert [prompt.asked_tokens for prompt in report.prompts] == [20, 33]


@pytest.mark.xdist_group(UNALIGNED)
def test_the_receiver_alone_is_measured_by_turns(
    recorded_pipeline: Callable[[str], C2CPipeline], monkeypatch: pytest.MonkeyPatch
):
    turns: list[bool] = []
    run_once = measure.run_once

    def note(*arguments: Any, fuse: bool) -> measure.Run:
        turns.append(fuse)
        return run_once(*arguments, fuse=fuse)

    monkeypatch.setattr(measure, "run_once", note)
    pipeline = recorded_pipeline(UNALIGNED)
    prompt = make_prompt(pipeline, 8, np.random.default_rng(0))
    measured = measure.measure_prompt(pipeline, prompt, new_tokens=3, repeats=2, weight_bytes=1)
    assert turns == [True, False] * 3
    assert len(measured.token_ids) == 3


@pytest.mark.xdist_group(CLOSED)
def test_a_sharer_whose_gates_are_closed_is_no_work(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    report = bench(recorded_bundle(CLOSED), "--prompt-tokens", 20, "--roofline")
    (prompt,) = report.prompts
    assert prompt.sharer_tokens == {}
    assert prompt.c2c.sharer_prefill == prompt.c2c.fuse == 0
    assert report.roofline is not None
    (share,) = report.roofline.shares
    assert share.sharer_prefill is share.fuse is None
    assert share.gflop["sharer_prefill"] == share.gflop["fuse"] == 0


@pytest.mark.xdist_group(UNALIGNED)
def test_a_busy_machine_is_said_to_be_one(run_bench: RunCli, recorded_bundle: BundleOf):
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            code, out, err = run_bench(recorded_bundle(UNALIGNED), *small)
        finally:
            other.kill()
    assert code == 0, err
    assert re.search(r"The machine was busy: other processes took \d+\.\d of its processors", out)


@pytest.mark.xdist_group(UNALIGNED)
def test_memory_stands_beside_weights_and_caches(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    path = recorded_bundle(UNALIGNED)
    report = bench(path, "--prompt-tokens", 20, "--batch", 2)
    manifest = C2CPipeline.from_bundle(path, num_threads=1).bundle.manifest
    models = [manifest.receiver, *(sharer.model for sharer in manifest.sharers)]
    # Upper layers of a sharer that no gate reads have no caches.
    most = sum(2 * 4 * m.num_layers * m.num_key_value_heads * m.head_dim * manifest.max_length for m in models)
    assert 0 < report.bundle.cache_bytes_per_slot <= most
    weights = sum(file.stat().st_size for file in (path / "graphs").glob("*.data"))
    lowered = sum(file.stat().st_size for file in (path / "engines" / "ort-cpu-fp32").iterdir())
    assert report.bundle.weight_bytes == weights + lowered
    per_row = report.bundle.cache_bytes_per_slot // manifest.max_length
    for memory, slots in ((report.prompts[0].memory, 1), (report.batches[0].memory, 2)):
        assert memory is not None
        assert memory.weight_bytes == report.bundle.weight_bytes
        # The receiver has rows for 20 tokens and 3 of 4 new ones, the sharer for 19.
        assert slots * 19 * per_row < memory.cache_bytes < slots * 23 * per_row
        needed = memory.weight_bytes + memory.cache_bytes
        assert memory.peak_bytes > needed
        assert memory.excess == pytest.approx(memory.peak_bytes / needed - 1)


@pytest.mark.xdist_group(ALIGNED)
def test_an_aligned_pair_reads_words_as_long_as_asked_for(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    report = bench(recorded_bundle(ALIGNED), "--prompt-tokens", 100)
    (prompt,) = report.prompts
    assert 95 <= prompt.receiver_tokens <= 100
    assert 0 < prompt.fused_tokens < prompt.receiver_tokens
    assert prompt.c2c.fuse > 0


@pytest.mark.xdist_group(TWO_SHARERS)
def test_two_sharers_are_measured_together(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    report = bench(recorded_bundle(TWO_SHARERS), "--prompt-tokens", 20)
    assert len(report.bundle.sharers) == 2
    assert report.prompts[0].sharer_tokens == {0: 19, 1: 19}


@pytest.mark.xdist_group(UNALIGNED)
def test_lengths_that_fit_are_the_default(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    assert bench(recorded_bundle(UNALIGNED)).settings.prompt_tokens == (128,)  # of 256, less the new tokens


@pytest.mark.xdist_group(UNALIGNED)
def test_the_roofline_relates_every_prompt_to_the_machine(bench: Callable[..., BenchReport], recorded_bundle: BundleOf):
    report = bench(recorded_bundle(UNALIGNED), "--prompt-tokens", 20, "--roofline")
    roofline = report.roofline
    assert roofline is not None
    assert roofline.gemm_gflops == max(gemm.gflops for gemm in roofline.gemms) > 0
    assert roofline.read_gb_per_second > 0
    (share,) = roofline.shares
    seconds = report.prompts[0].c2c
    assert share.gflop["ttft"] == pytest.approx(sum(value for key, value in share.gflop.items() if key != "ttft"))
    assert share.ttft == pytest.approx(share.gflop["ttft"] / seconds.ttft / roofline.gemm_gflops)
    for phase in ("sharer_prefill", "receiver_prefill", "fuse"):
        share_of_phase = share.gflop[phase] / getattr(seconds, phase) / roofline.gemm_gflops
        assert getattr(share, phase) == pytest.approx(share_of_phase)


@pytest.mark.xdist_group(UNALIGNED)
@pytest.mark.parametrize(("name", "beginning"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_plot_is_drawn(run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path, name: str, beginning: bytes):
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8, "--batch", 1, "--batch", 2)
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *small, "--plot", tmp_path / name)
    assert code == 0, err
    assert (tmp_path / name).read_bytes().startswith(beginning)
    assert "receiver alone" in out


@pytest.mark.xdist_group(UNALIGNED)
def test_text_to_text_is_compared_on_every_question(
    bench: Callable[..., BenchReport], recorded_bundle: BundleOf, sharer_bundle: Path
):
    report = bench(recorded_bundle(UNALIGNED), "--prompt-tokens", 8, "--text-to-text", sharer_bundle)
    record = report.text_to_text
    assert record is not None
    assert len(record.questions) == 3
    for question in record.questions:
        assert 0 < question.text_to_text.hint_tokens <= 64
        assert question.c2c.hint_tokens == 0
        for times in (question.c2c, question.text_to_text):
            assert 0 < times.first_token <= times.answer
            assert 1 <= times.answer_tokens <= 4
    ratios = sorted(q.text_to_text.answer / q.c2c.answer for q in record.questions)
    assert record.answer_ratio == pytest.approx(ratios[1])


def edited(bundle: Path, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle, its manifest changed."""
    copy = Path(shutil.copytree(bundle, folder / "edited.bundle"))
    manifest = json.loads((copy / "manifest.json").read_text())
    edit(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture(scope="session")
def sharer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the unaligned pair's sharer alone."""
    from c2c_export.pair import PairOptions, export_pair

    output = tmp_path_factory.mktemp("one_model") / "sharer.bundle"
    options = PairOptions(str(GOLDEN / UNALIGNED / "sharer"), (), (), output, max_length=256)
    return export_pair(options, lambda _: contextlib.nullcontext())


# Refusals

MISUSE: dict[str, tuple[list[Any], str]] = {
    "prompt too long": (["--prompt-tokens", 250], r"--prompt-tokens 250 and --new-tokens 32 .* capacity of 256"),
    "prompt too short": (["--prompt-tokens", 1], "--prompt-tokens 1: expected at least 2"),
    "no room for a prompt": (["--new-tokens", 255], "--new-tokens 255: the bundle's capacity is 256"),
    "no requests": (["--batch", 0], "--batch 0: expected at least 1"),
    "no repeats": (["--repeats", 0], "--repeats 0: expected at least 1"),
    "one new token": (["--new-tokens", 1], "--new-tokens 1: expected at least 2"),
    "no threads": (["--threads", 0], "--threads is 0, expected 1 to"),
    "threads without number": (["--threads", 999999], "--threads is 999999, expected 1 to"),
    "a negative seed": (["--seed", -1], "--seed -1: expected at least 0"),
    "requests without number": (["--batch", 100_000], "--batch 100000: expected at most 4096 requests"),
    "no folder": (["--json", "/nowhere/report.json"], "no folder /nowhere"),
    "a folder": (["--json", "/"], "/ is a folder"),
    "another kind of plot": (["--plot", "a.jpeg"], r"--plot a.jpeg: expected a name that ends in .png or .svg"),
    "no checkout": (["--reference", GOLDEN], "no checkout of thu-nics/C2C"),
    "sources without a reference": (["--sharer", "a"], "are for --reference, which is not given"),
    "roofline of a GPU": (["--roofline", "--engine", "tensorrt"], "--roofline measures this machine's CPU"),
    "another engine": (["--engine", "tensorrt"], "has no engine tensorrt"),
}


@pytest.mark.xdist_group(UNALIGNED)
@pytest.mark.parametrize("case", MISUSE)
def test_wrong_use_is_refused_in_a_line(run_bench: RunCli, recorded_bundle: BundleOf, case: str):
    arguments, message = MISUSE[case]
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) <= 3


@pytest.mark.xdist_group(UNALIGNED)
@pytest.mark.parametrize(
    ("available", "advice"),
    [(10 << 20, r"ask for at most [1-9]\d*$"), (10, "ask for shorter prompts, or free memory$")],
)
def test_more_requests_than_memory_holds_are_refused(
    run_bench: RunCli, recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch, available: int, advice: str
):
    monkeypatch.setattr("c2c_export.bench.batch.available_bytes", lambda: available)
    code, out, err = run_bench(recorded_bundle(UNALIGNED), "--batch", 2, "--batch", 4096)
    assert (code, out) == (2, "")
    assert re.search(
        r"--batch 4096: the caches and logits of so many requests of 160 tokens take .*" + advice, err, re.M
    )


@pytest.mark.xdist_group(UNALIGNED)
def test_the_memory_of_requests_is_that_of_caches_and_logits(
    recorded_pipeline: Callable[[str], C2CPipeline], monkeypatch: pytest.MonkeyPatch
):
    pipeline = recorded_pipeline(UNALIGNED)
    manifest = pipeline.bundle.manifest
    rows = sum(decoder.pool.slot_bytes // manifest.max_length for decoder in pipeline.decoders)
    needed = 3 * (20 * rows + 8 * manifest.receiver.vocab_size)
    monkeypatch.setattr("c2c_export.bench.batch.available_bytes", lambda: needed)
    check_batches(pipeline, [3], 20)
    monkeypatch.setattr("c2c_export.bench.batch.available_bytes", lambda: needed - 1)
    with pytest.raises(UsageError, match="ask for at most 2"):
        check_batches(pipeline, [3], 20)


@pytest.mark.xdist_group(UNALIGNED)
def test_a_folder_that_cannot_be_written_is_refused(
    run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    access = os.access
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, *mode, **named: path != tmp_path and access(path, *mode, **named))
    code, _, err = run_bench(recorded_bundle(UNALIGNED), "--json", tmp_path / "report.json")
    assert code == 2
    assert f"the folder {tmp_path} cannot be written into" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_an_engine_that_is_not_there_is_refused_before_models_are_sought(
    run_bench: RunCli, recorded_bundle: BundleOf, empty_checkout: Path
):
    path = recorded_bundle(UNALIGNED)
    code, _, err = run_bench(path, "--precision", "int8", "--reference", empty_checkout, "--receiver", "gone")
    assert code == 2
    assert "has no engine ort-cpu in int8" in err
    assert "Finding" not in err


@pytest.mark.xdist_group(UNALIGNED)
def test_a_reference_needs_its_sources(run_bench: RunCli, recorded_bundle: BundleOf, empty_checkout: Path):
    path = recorded_bundle(UNALIGNED)
    code, _, err = run_bench(path, "--reference", empty_checkout, "--receiver", empty_checkout / "gone")
    assert code == 2
    assert re.search(r"--reference: .*gone.*; name it with --receiver", err)
    code, _, err = run_bench(path, "--reference", empty_checkout, "--sharer", GOLDEN)
    assert code == 2
    assert "1 --sharer and 0 --fuser given" in err
    code, _, err = run_bench(path, "--reference", empty_checkout, "--reference-python", empty_checkout / "python")
    assert code == 2
    assert "no such interpreter" in err
    code, _, err = run_bench(path, "--reference", empty_checkout, "--reference-python", GOLDEN / "README.md")
    assert code == 2
    assert "not a file that can be run" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_a_research_code_that_fails_costs_no_measurements(
    run_bench: RunCli, recorded_bundle: BundleOf, empty_checkout: Path
):
    report, pair = empty_checkout / "report.json", GOLDEN / UNALIGNED
    sources = ("--receiver", pair / "receiver", "--sharer", pair / "sharer", "--fuser", pair / "fuser")
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8, "--json", report)
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *small, "--reference", empty_checkout, *sources)
    assert code == 1
    assert "the research code failed" in err
    written = json.loads(report.read_text())
    assert f"{written['prompts'][0]['c2c']['ttft']:.3f}" in out
    assert written["reference"] is None
    assert "the research code failed" in written["problems"][0]


FAILING = {
    "a prompt": (["--prompt-tokens", 9], "measure_prompt", C2CError("no memory"), "a prompt of 9 tokens: no memory"),
    "steps": (["--batch", 2], "measure_batches", C2CError("no memory"), "--batch 2: no memory"),
    "the machine": (["--roofline"], "_roofline", MemoryError(), "--roofline: MemoryError"),
    "the research code": ([], "_reference", KeyError("runs"), "--reference: KeyError: 'runs'"),
    "text-to-text": ([], "_text_to_text", OSError("gone"), "--text-to-text: OSError: gone"),
    "tables": ([], "_lookup_bytes", ValueError("no graph"), "looked-up tables: ValueError: no graph"),
}


@pytest.mark.xdist_group(UNALIGNED)
@pytest.mark.parametrize("part", FAILING)
def test_a_part_that_fails_costs_no_measurements(
    run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    options, function, error, message = FAILING[part]
    measure = getattr(run, function)

    def fail(*arguments: Any, **named: Any) -> Any:
        if function == "measure_prompt" and arguments[1].asked_tokens == 8:
            return measure(*arguments, **named)
        raise error

    monkeypatch.setattr(run, function, fail)
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8, "--json", tmp_path / "a.json")
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *small, *options)
    assert code == 1
    assert message in err
    report = BenchReport.model_validate_json((tmp_path / "a.json").read_text())
    assert [prompt.asked_tokens for prompt in report.prompts] == [8]
    assert f"{report.prompts[0].c2c.ttft:.3f}" in out
    assert report.problems == (message,)


INTERRUPTED = {
    "a prompt": (["--prompt-tokens", 9], "measure_prompt", "a prompt of 9 tokens: interrupted"),
    "steps": (["--batch", 2], "measure_batches", "--batch 2: interrupted"),
    "text-to-text": ([], "_text_to_text", "--text-to-text: interrupted"),
    "the research code": ([], "_reference", "--reference: interrupted"),
}


@pytest.mark.xdist_group(UNALIGNED)
@pytest.mark.parametrize("part", INTERRUPTED)
def test_an_interrupt_ends_the_measuring_and_costs_no_measurements(
    run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    options, function, message = INTERRUPTED[part]
    measure = getattr(run, function)
    tried: list[str] = []

    def interrupt(*arguments: Any, **named: Any) -> Any:
        if function == "measure_prompt" and arguments[1].asked_tokens == 8:
            return measure(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, function, interrupt)
    if function != "_reference":
        monkeypatch.setattr(run, "_reference", lambda *_: tried.append("later"))
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8, "--json", tmp_path / "a.json")
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *small, *options)
    assert code == 130
    assert message in err
    report = BenchReport.model_validate_json((tmp_path / "a.json").read_text())
    assert report.interrupted
    assert report.problems == (message,)
    assert f"{report.prompts[0].c2c.ttft:.3f}" in out
    assert tried == []


@pytest.mark.xdist_group(UNALIGNED)
def test_an_interrupt_before_anything_is_measured_is_one(
    run_bench: RunCli, recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_prompt", interrupt)
    code, out, _ = run_bench(recorded_bundle(UNALIGNED), "--prompt-tokens", 8)
    assert (code, out) == (130, "")


@pytest.mark.xdist_group(UNALIGNED)
def test_where_no_prompt_can_be_measured_the_reason_is_told(
    run_bench: RunCli, recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise C2CError("no memory")

    monkeypatch.setattr(run, "measure_prompt", fail)
    code, out, err = run_bench(recorded_bundle(UNALIGNED), "--prompt-tokens", 8)
    assert (code, out) == (1, "")
    assert "a prompt of 8 tokens: no memory" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_files_that_cannot_be_written_cost_no_tables(
    run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("c2c_export.atomic_file.write_atomically", fail)
    monkeypatch.setattr("c2c_export.bench.plot.write_atomically", fail)
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8)
    files = ("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *small, *files)
    assert code == 1
    assert "receiver alone" in out
    for option, path in zip(files[::2], files[1::2], strict=True):
        assert f"{option} {path}: cannot be written: No space left on device" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_text_to_text_needs_the_sharers_own_bundle(run_bench: RunCli, recorded_bundle: BundleOf):
    path = recorded_bundle(UNALIGNED)
    code, _, err = run_bench(path, "--text-to-text", path)
    assert code == 2
    assert "expected the files of the pair's sharer" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_text_to_text_needs_a_bundle_of_one_model(run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path):
    def share_itself(manifest: dict[str, Any]) -> None:
        manifest["sharers"][0]["model"]["sources"] = manifest["receiver"]["sources"]

    path = recorded_bundle(UNALIGNED)
    code, _, err = run_bench(edited(path, tmp_path, share_itself), "--text-to-text", path)
    assert code == 2
    assert f"--text-to-text {path}: a pair's bundle, expected that of its receiver alone" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_text_to_text_needs_room_for_hints_and_answers(
    run_bench: RunCli, recorded_bundle: BundleOf, sharer_bundle: Path, tmp_path: Path
):
    small = edited(sharer_bundle, tmp_path, lambda manifest: manifest.update(max_length=64))
    code, out, err = run_bench(recorded_bundle(UNALIGNED), "--text-to-text", small)
    assert (code, out) == (2, "")
    assert re.search(rf"--text-to-text {small}: prompt, hint and answer take \d+ tokens, .* capacity is 64", err)
    many = ("--prompt-tokens", 8, "--new-tokens", 200)
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *many, "--text-to-text", sharer_bundle)
    assert (code, out) == (2, "")
    assert re.search(r"--text-to-text: prompt, hint and answer take \d+ tokens, .* capacity is 256", err)


@pytest.mark.xdist_group(UNALIGNED)
def test_text_to_text_needs_the_pairs_own_engine(
    run_bench: RunCli, recorded_bundle: BundleOf, sharer_bundle: Path, tmp_path: Path
):
    pair = shutil.copytree(recorded_bundle(UNALIGNED), tmp_path / "pair.bundle")
    build(BuildOptions(pair, "ort-cpu", "int8"), lambda _: contextlib.nullcontext())
    code, _, err = run_bench(pair, "--precision", "int8", "--text-to-text", sharer_bundle)
    assert code == 2
    assert (
        f"has no engine ort-cpu in int8, on which the pair runs; build it with: c2c-export build {sharer_bundle} "
        in err
    )


@pytest.mark.xdist_group(ALIGNED)
def test_a_template_longer_than_the_prompt_is_named(run_bench: RunCli, recorded_bundle: BundleOf):
    code, _, err = run_bench(recorded_bundle(ALIGNED), "--prompt-tokens", 2, "--new-tokens", 4)
    assert code == 2
    assert "--prompt-tokens 2: the chat template alone takes as many" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_a_missing_library_is_named_with_its_extra(
    run_bench: RunCli, recorded_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("c2c_export.bench.options.find_spec", lambda _: None)
    for option, module in ((("--plot", "a.png"), "matplotlib"), (("--roofline",), "onnx_ir")):
        code, _, err = run_bench(recorded_bundle(UNALIGNED), *option)
        assert code == 2
        assert module in err
        assert "'.[bench]'" in err


@pytest.mark.xdist_group(UNALIGNED)
def test_the_json_holds_what_the_tables_show(run_bench: RunCli, recorded_bundle: BundleOf, tmp_path: Path):
    path = tmp_path / "report.json"
    small = ("--threads", 1, "--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 8, "--batch", 1)
    code, out, err = run_bench(recorded_bundle(UNALIGNED), *small, "--json", path)
    assert code == 0, err
    report = json.loads(path.read_text())
    (prompt,) = report["prompts"]
    assert f"{prompt['c2c']['ttft']:.3f}" in out
    assert f"{prompt['c2c']['decode_ms_per_token']:.2f}" in out
    (batch,) = report["batches"]
    assert f"{batch['ms_per_step']:.2f}" in out
    # Of the sharer at least its embedding.
    assert 0 < report["bundle"]["lookup_bytes"] < report["bundle"]["weight_bytes"]
    assert "of them looked up" in out
