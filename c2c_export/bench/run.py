"""Run a benchmark: options in, a `BenchReport` out. What can be refused is refused before anything is measured.

The order keeps measures apart: peak memory first, while nothing but the bundle is loaded; the other models, the
machine's own speed and the research code, in its own process, last.
"""

import platform
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from c2c_export import __version__
from c2c_export.bench.attempts import Attempts
from c2c_export.bench.batch import check_batches, measure_batches
from c2c_export.bench.measure import MeasuredPrompt, measure_prompt
from c2c_export.bench.memory import PeakMemory
from c2c_export.bench.options import BenchOptions, check_options, prompt_lengths
from c2c_export.bench.other_load import OtherLoad
from c2c_export.bench.prompts import BenchPrompt, make_prompt
from c2c_export.bench.report import (
    BatchRecord,
    BenchReport,
    BundleSummary,
    MachineRecord,
    PromptRecord,
    ReferenceRecord,
    RooflineRecord,
    Settings,
    TextToTextRecord,
)
from c2c_export.bench.text_to_text import (
    check_pair_capacity,
    check_sharer_bundle,
    check_sharer_engine,
    measure_text_to_text,
)
from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError
from c2c_export.progress import Step
from engines.cores import physical_cores, usable_cores
from engines.select import EngineChoice, wanted_engines
from engines.targets import target_of
from runtime import C2CPipeline

if TYPE_CHECKING:
    from c2c_export.bench.reference import ReferenceSources


def run_bench(options: BenchOptions, step: Step) -> BenchReport:
    """Measure what `options` ask for.

    Raises `UsageError` for what cannot be measured, what opening the bundle raises, and `C2CError` where no prompt
    could be measured. Whatever else fails is told in the report, so that it costs no measurements; so is an interrupt,
    which ends the measuring, once there is a prompt to report of.
    """
    check_options(options)
    bundle = Bundle.open(options.bundle)
    wanted_engines(bundle, options.engine, options.precision)
    lengths = prompt_lengths(options, bundle.manifest)
    if options.text_to_text is not None:
        check_sharer_bundle(options.text_to_text, bundle.manifest)
    sources = _find_sources(options, bundle, step)
    num_threads = options.threads or physical_cores()
    attempts, load, random = Attempts(), OtherLoad(), np.random.default_rng(options.seed)

    choice, summary, measured = _measure_prompts(options, lengths, attempts, random, step)
    if not measured and attempts.interrupted:
        raise KeyboardInterrupt
    if not measured:
        raise C2CError("\n".join(attempts.problems))
    records = [prompt.record for prompt in measured]
    batches = _measure_batches(options, choice, lengths, summary.weight_bytes, attempts, random, step)
    text_to_text = attempts.attempt("--text-to-text", lambda: _text_to_text(options, choice, step))
    roofline = attempts.attempt("--roofline", lambda: _roofline(options, bundle, choice, records, num_threads, step))
    reference = attempts.attempt(
        "--reference", lambda: _reference(options, bundle, sources, measured, num_threads, step)
    )
    lookup_bytes = attempts.attempt("looked-up tables", lambda: _lookup_bytes(bundle, choice))
    return BenchReport(
        machine=_machine(num_threads, load),
        bundle=summary.model_copy(update={"lookup_bytes": lookup_bytes}),
        settings=Settings(
            prompt_tokens=tuple(lengths),
            batches=tuple(sorted(set(options.batches))),
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            seed=options.seed,
        ),
        prompts=tuple(records),
        batches=tuple(sorted(batches, key=lambda record: (record.asked_tokens, record.batch))),
        text_to_text=text_to_text,
        roofline=roofline,
        reference=reference,
        problems=tuple(attempts.problems),
        interrupted=attempts.interrupted,
    )


def _measure_prompts(
    options: BenchOptions, lengths: Sequence[int], attempts: Attempts, random: np.random.Generator, step: Step
) -> tuple[EngineChoice, BundleSummary, list[MeasuredPrompt]]:
    """Open the bundle, check what only its engines tell, and measure a prompt of each length."""
    memory, started = PeakMemory(), time.perf_counter()
    with step("Loading the engines"):
        pipeline = _open(options, options.engine, options.precision, 1)
    choice = pipeline.engine_choice
    summary = _summarise(pipeline, time.perf_counter() - started, memory)
    check_batches(pipeline, options.batches, max(lengths) + options.new_tokens)
    if options.text_to_text is not None:
        check_sharer_engine(options.text_to_text, choice)
        check_pair_capacity(pipeline, options.new_tokens)
    made: list[BenchPrompt] = [make_prompt(pipeline, length, random) for length in lengths]
    measured: list[MeasuredPrompt] = []
    for prompt in made:
        what = f"a prompt of {len(prompt.plan.receiver.ids)} tokens"

        def measure(prompt: BenchPrompt = prompt, what: str = what) -> None:
            with step(f"Measuring {what}"):
                measured.append(
                    measure_prompt(pipeline, prompt, options.new_tokens, options.repeats, summary.weight_bytes)
                )

        attempts.attempt(what, measure)
    return choice, summary, measured


def _measure_batches(
    options: BenchOptions,
    choice: EngineChoice,
    lengths: Sequence[int],
    weight_bytes: int,
    attempts: Attempts,
    random: np.random.Generator,
    step: Step,
) -> list[BatchRecord]:
    """Measure every number of requests, in a pipeline of its own; what was measured before one failed stays."""
    records: list[BatchRecord] = []
    for batch in sorted(set(options.batches)):

        def measure(batch: int = batch) -> None:
            with step(f"Measuring steps of {batch} request(s)"):
                records.extend(
                    measure_batches(
                        lambda num_slots: _open(options, choice.target, choice.precision, num_slots),
                        batch,
                        lengths,
                        options.new_tokens,
                        options.repeats,
                        random,
                        weight_bytes,
                    )
                )

        attempts.attempt(f"--batch {batch}", measure)
    return records


def _open(options: BenchOptions, engine: str, precision: str | None, num_slots: int) -> C2CPipeline:
    return _open_bundle(options.bundle, options, engine, precision, num_slots)


def _open_bundle(path: Path, options: BenchOptions, engine: str, precision: str | None, num_slots: int) -> C2CPipeline:
    return C2CPipeline.from_bundle(
        path,
        engine,
        precision,
        num_slots=num_slots,
        num_threads=options.threads,
        allow_unchecked=options.allow_unchecked,
        allow_failed=options.allow_failed,
    )


def _text_to_text(options: BenchOptions, choice: EngineChoice, step: Step) -> TextToTextRecord | None:
    if options.text_to_text is None:
        return None
    with step("Measuring text-to-text"):
        pipeline = _open(options, choice.target, choice.precision, 1)
        sharer = _open_bundle(options.text_to_text, options, choice.target, choice.precision, 1)
        return measure_text_to_text(pipeline, sharer, options.new_tokens, options.repeats)


def _roofline(
    options: BenchOptions,
    bundle: Bundle,
    choice: EngineChoice,
    prompts: Sequence[PromptRecord],
    num_threads: int,
    step: Step,
) -> RooflineRecord | None:
    if not options.roofline:
        return None
    from c2c_export.bench.roofline import measure_roofline, read_pair_work  # needs onnx_ir

    with step("Measuring the machine's products and reads"):
        work = read_pair_work(bundle, choice.record)
        return measure_roofline(work, prompts, options.new_tokens, options.threads, num_threads, options.repeats)


def _find_sources(options: BenchOptions, bundle: Bundle, step: Step) -> "ReferenceSources | None":
    if options.reference is None:
        return None
    from c2c_export.bench.reference import find_sources

    with step("Finding the research code's models"):
        return find_sources(options.reference, bundle.manifest)


def _reference(
    options: BenchOptions,
    bundle: Bundle,
    sources: "ReferenceSources | None",
    measured: Sequence[MeasuredPrompt],
    num_threads: int,
    step: Step,
) -> ReferenceRecord | None:
    if options.reference is None or sources is None:
        return None
    from c2c_export.bench.reference import compare, make_request, run_reference, seconds_allowed

    with step("Measuring the research code"):
        request = make_request(
            options.reference,
            sources,
            bundle.manifest.fusion_mode,
            [prompt.plan for prompt in measured],
            threads=num_threads,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
        )
        seconds = seconds_allowed(measured, options.new_tokens, options.repeats)
        return compare(run_reference(request, options.reference.python, seconds), measured, request.checkout)


def _lookup_bytes(bundle: Bundle, choice: EngineChoice) -> int | None:
    """See `BundleSummary.lookup_bytes`; None without onnx_ir, which the bare install leaves out, and for TensorRT."""
    if find_spec("onnx_ir") is None or not target_of(choice.target).runs_on_onnx_runtime:
        return None
    from c2c_export.bench.work import lookup_weight_bytes

    return sum(lookup_weight_bytes(bundle.file(path)) for path in choice.record.graphs.values())


def _summarise(pipeline: C2CPipeline, load_seconds: float, memory: PeakMemory) -> BundleSummary:
    bundle, choice, resident = pipeline.bundle, pipeline.engine_choice, memory.read()
    manifest = bundle.manifest
    return BundleSummary(
        path=str(bundle.root),
        engine=choice.target,
        precision=choice.precision,
        reason=choice.reason,
        receiver=manifest.receiver.source,
        sharers=tuple(sharer.model.source for sharer in manifest.sharers),
        aligned=manifest.aligned,
        max_length=manifest.max_length,
        weight_bytes=sum(path.stat().st_size for path in bundle.engine_files(choice.record)),
        cache_bytes_per_slot=sum(decoder.pool.slot_bytes for decoder in pipeline.decoders),
        load_seconds=load_seconds,
        load_peak_bytes=None if resident is None else resident.peak,
    )


def _machine(num_threads: int, load: OtherLoad) -> MachineRecord:
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    names = [line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    memory = [int(line.split()[1]) << 10 for line in _lines(meminfo) if line.startswith("MemTotal:")]
    return MachineRecord(
        processor=names[0] if names else platform.processor() or platform.machine(),
        cores=len(usable_cores()),
        threads=num_threads,
        memory_bytes=memory[0] if memory else None,
        others_cores=load.cores(),
        system=f"{platform.system()} {platform.release()}",
        versions={
            "c2c-export": __version__,
            "python": platform.python_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
        },
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
