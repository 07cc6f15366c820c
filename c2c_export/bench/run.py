"""Run a benchmark: options in, a `BenchReport` out. What can be refused is refused before anything is measured.

The order keeps measures apart: peak memory first, while nothing but the bundle is loaded; the other models, the
machine's own speed and the research code, in its own process, last.
"""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from c2c_export import __version__
from c2c_export.bench.batch import measure_batches
from c2c_export.bench.measure import Sizes, measure_prompt
from c2c_export.bench.memory import PeakMemory
from c2c_export.bench.options import BenchOptions, ReferenceOptions, check_options, prompt_lengths
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
from c2c_export.bench.text_to_text import check_sharer_bundle, measure_text_to_text
from c2c_export.bundle import Bundle, Manifest
from c2c_export.errors import C2CError, UsageError
from c2c_export.progress import Step
from runtime import C2CPipeline


def run_bench(options: BenchOptions, step: Step) -> BenchReport:
    """Measure what `options` ask for.

    Raises `UsageError` for what cannot be measured, and what opening the bundle raises. A failure of the research code
    is told in the report, so that it costs no measurements.
    """
    check_options(options)
    manifest = Bundle.open(options.bundle).manifest
    lengths = prompt_lengths(options, manifest)
    if options.text_to_text is not None:
        check_sharer_bundle(options.text_to_text, manifest)
    if options.reference is not None:
        _check_sources(options.reference, manifest)
    num_threads = options.threads or physical_cores()
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    random = np.random.default_rng(options.seed)

    memory, started = PeakMemory(), time.perf_counter()
    with step("Loading the engines"):
        pipeline = C2CPipeline.from_bundle(
            options.bundle,
            options.engine,
            options.precision,
            num_slots=max(options.batches),
            num_threads=options.threads,
        )
    summary = _summarise(pipeline, time.perf_counter() - started, memory)
    sizes = Sizes(summary.weight_bytes, summary.cache_bytes_per_slot)
    made: list[BenchPrompt] = [make_prompt(pipeline, length, random) for length in lengths]
    prompts: list[PromptRecord] = []
    generated: list[list[int]] = []
    for prompt in made:
        with step(f"Measuring a prompt of {len(prompt.plan.receiver.ids)} tokens"):
            record, tokens = measure_prompt(pipeline, prompt, options.new_tokens, options.repeats, sizes)
            prompts.append(record)
            generated.append(tokens)
    batches: list[BatchRecord] = []
    for length in lengths:
        with step(f"Measuring steps after {length} tokens for {_listed(options.batches)} request(s)"):
            batches += measure_batches(
                pipeline, length, options.batches, options.new_tokens, options.repeats, random, sizes
            )
    text_to_text = _text_to_text(options, pipeline, step)
    roofline = _roofline(options, pipeline, prompts, num_threads, step)
    reference, reference_problem = None, None
    try:
        reference = _reference(options, manifest, made, prompts, generated, num_threads, step)
    except C2CError as error:
        reference_problem = str(error)
    return BenchReport(
        machine=_machine(num_threads, load_before),
        bundle=summary,
        settings=Settings(
            prompt_tokens=tuple(lengths),
            batches=tuple(sorted(set(options.batches))),
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            seed=options.seed,
        ),
        prompts=tuple(prompts),
        batches=tuple(batches),
        text_to_text=text_to_text,
        roofline=roofline,
        reference=reference,
        reference_problem=reference_problem,
    )


def physical_cores() -> int:
    """Cores that this process may use, two hyper-threads of one counted once; as ONNX Runtime counts by default."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for number in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(number))
    return len(cores)


def _text_to_text(options: BenchOptions, pipeline: C2CPipeline, step: Step) -> TextToTextRecord | None:
    if options.text_to_text is None:
        return None
    with step("Measuring text-to-text"):
        choice = pipeline.engine_choice
        sharer = C2CPipeline.from_bundle(
            options.text_to_text, choice.target, choice.precision, num_slots=1, num_threads=options.threads
        )
        return measure_text_to_text(pipeline, sharer, options.new_tokens, options.repeats)


def _roofline(
    options: BenchOptions, pipeline: C2CPipeline, prompts: Sequence[PromptRecord], num_threads: int, step: Step
) -> RooflineRecord | None:
    if not options.roofline:
        return None
    from c2c_export.bench.roofline import measure_roofline, read_pair_work  # needs onnx_ir

    with step("Measuring the machine's products and reads"):
        work = read_pair_work(pipeline.bundle, pipeline.engine_choice.record)
        return measure_roofline(work, prompts, options.new_tokens, options.threads, num_threads, options.repeats)


def _reference(
    options: BenchOptions,
    manifest: Manifest,
    made: Sequence[BenchPrompt],
    prompts: Sequence[PromptRecord],
    generated: Sequence[Sequence[int]],
    num_threads: int,
    step: Step,
) -> ReferenceRecord | None:
    if options.reference is None:
        return None
    from c2c_export.bench.reference import compare, make_request, run_reference  # loads torch

    with step("Measuring the research code"):
        request = make_request(
            options.reference,
            manifest,
            [prompt.plan for prompt in made],
            threads=num_threads,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
        )
        return compare(run_reference(request, options.reference.python), prompts, generated, request.checkout)


def _check_sources(reference: ReferenceOptions, manifest: Manifest) -> None:
    """Refuse paths that are not there before anything is measured; hub ids are looked up later."""
    if not manifest.sharers:
        raise UsageError("--reference: the bundle has no sharer, and the research code runs pairs")
    sources = [("--receiver", reference.receiver or manifest.receiver.source)]
    sources += [("--sharer", s) for s in reference.sharers or [sharer.model.source for sharer in manifest.sharers]]
    sources += [("--fuser", f) for f in reference.fusers or [sharer.fuser_source for sharer in manifest.sharers]]
    for option, source in sources:
        is_hub_id = source.count("/") == 1 and not source.startswith((".", "~", "/")) and not source.endswith(".gguf")
        if not Path(source).exists() and not is_hub_id:
            raise UsageError(f"--reference: {source} is not there; name it with {option}")


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


def _machine(num_threads: int, load_before: float | None) -> MachineRecord:
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    names = [line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    memory = [int(line.split()[1]) << 10 for line in _lines(meminfo) if line.startswith("MemTotal:")]
    return MachineRecord(
        processor=names[0] if names else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=num_threads,
        memory_bytes=memory[0] if memory else None,
        load_before=load_before,
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


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in sorted(set(numbers)))
