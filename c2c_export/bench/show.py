"""Print a benchmark's report as tables."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from c2c_export.bench.report import (
    BenchReport,
    MemoryRecord,
    PhaseTimes,
    ReferenceRecord,
    RooflineRecord,
    TextToTextRecord,
)

BUSY = 0.1
"""Processors that others keep busy during a benchmark from which on its times are doubtful."""


def print_report(report: BenchReport, console: Console) -> None:
    """Print `report` to `console`."""
    machine, bundle, settings = report.machine, report.bundle, report.settings
    console.print(
        f"[bold]{escape(bundle.path)}[/]: {bundle.engine} in {bundle.precision}, {machine.threads} thread(s) on "
        f"{escape(machine.processor)}; medians of {settings.repeats} runs, {settings.new_tokens} new tokens",
        highlight=False,
        soft_wrap=True,
    )
    if machine.others_cores is not None and machine.others_cores > BUSY:
        console.print(
            f"[yellow]The machine was busy[/]: other processes took {machine.others_cores:.1f} of its processors; "
            "measure again when nothing else runs",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_prompts(report))
    if any(prompt.memory for prompt in report.prompts):
        console.print(_memory(report))
    if report.batches:
        console.print(_batches(report))
    if report.text_to_text is not None:
        console.print(_text_to_text(report.text_to_text))
    if report.roofline is not None:
        _print_roofline(report.roofline, console)
    if report.reference is not None:
        console.print(_reference(report.reference))


def _prompts(report: BenchReport) -> Table:
    table = Table(
        *("prompt tokens", "", "first token s", "least to most", "sharer s", "receiver s", "fuse s", "rest s"),
        *("ms/token", "quartiles", "tokens/s"),
    )
    for prompt in report.prompts:
        table.add_row(str(prompt.receiver_tokens), "C2C", *_phases(prompt.c2c))
        table.add_row("", "receiver alone", *_phases(prompt.receiver_alone))
    return table


def _phases(times: PhaseTimes) -> list[str]:
    seconds = (times.sharer_prefill, times.receiver_prefill, times.fuse, times.rest)
    return [
        f"{times.ttft:.3f}",
        _range(times.ttft_range, 3),
        *(f"{value:.3f}" for value in seconds),
        f"{times.decode_ms_per_token:.2f}",
        _range(times.decode_ms_quartiles, 2),
        f"{times.tokens_per_second:.1f}",
    ]


def _range(values: tuple[float, float], digits: int) -> str:
    return " to ".join(f"{value:.{digits}f}" for value in values)


def _memory(report: BenchReport) -> Table:
    lookups = report.bundle.lookup_bytes
    columns = ("prompt tokens", "requests", "peak MB", "weights MB", "of them looked up", "rows MB", "beyond both")
    table = Table(*columns, "measured by")
    rows = [(prompt.asked_tokens, 1, prompt.memory) for prompt in report.prompts]
    rows += [(batch.asked_tokens, batch.batch, batch.memory) for batch in report.batches]
    for tokens, requests, memory in rows:
        if memory is not None:
            table.add_row(str(tokens), str(requests), *_sizes(memory, lookups), memory.measured_by)
    return table


def _sizes(memory: MemoryRecord, lookups: int | None) -> list[str]:
    sizes = (memory.peak_bytes, memory.weight_bytes, lookups, memory.cache_bytes)
    return [*("" if size is None else f"{size / 1e6:.0f}" for size in sizes), f"{memory.excess:+.0%}"]


def _batches(report: BenchReport) -> Table:
    table = Table("prompt tokens", "requests", "ms/step", "tokens/s, all")
    for batch in report.batches:
        table.add_row(
            str(batch.asked_tokens), str(batch.batch), f"{batch.ms_per_step:.2f}", f"{batch.tokens_per_second:.1f}"
        )
    return table


def _text_to_text(record: TextToTextRecord) -> Table:
    table = Table(
        *("question", "", "first token s", "answer s", "hint tokens", "answer tokens"),
        title=f"C2C and text-to-text: first token {record.first_token_ratio:.1f}x, answer {record.answer_ratio:.1f}x "
        "as fast",
        title_justify="left",
    )
    for question in record.questions:
        for name, times in (("C2C", question.c2c), ("text-to-text", question.text_to_text)):
            table.add_row(
                escape(question.question) if name == "C2C" else "",
                name,
                f"{times.first_token:.3f}",
                f"{times.answer:.3f}",
                str(times.hint_tokens),
                str(times.answer_tokens),
            )
    return table


def _print_roofline(record: RooflineRecord, console: Console) -> None:
    beside = "" if record.numpy_gflops is None else f" (numpy {record.numpy_gflops:.0f})"
    console.print(
        f"The machine: products {record.gemm_gflops:.0f} GFLOP/s{beside}, reads {record.read_gb_per_second:.1f} GB/s "
        f"by {record.read_by}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("prompt tokens", "sharer", "receiver", "fuse", "first token", "GFLOP in all", "decode", "MB/step")
    for share in record.shares:
        table.add_row(
            str(share.asked_tokens),
            *(
                "" if value is None else f"{value:.0%}"
                for value in (share.sharer_prefill, share.receiver_prefill, share.fuse, share.ttft)
            ),
            f"{share.gflop['ttft']:.3g}",
            f"{share.decode:.0%}",
            f"{share.decode_bytes / 1e6:.3g}",
        )
    console.print(table)


def _reference(record: ReferenceRecord) -> Table:
    table = Table(
        *(
            "prompt tokens",
            "first token s",
            "least to most",
            "sharer s",
            "receiver s",
            "fuse s",
            "ms/token",
            "quartiles",
        ),
        *("first token, over ours", "ms/token, over ours", "equal tokens"),
        title="The research code with " + ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        title_justify="left",
    )
    for times in record.prompts:
        seconds = (times.sharer_prefill, times.receiver_prefill, times.fuse)
        table.add_row(
            str(times.asked_tokens),
            f"{times.ttft:.3f}",
            _range(times.ttft_range, 3),
            *(f"{value:.3f}" for value in seconds),
            f"{times.decode_ms_per_token:.2f}",
            _range(times.decode_ms_quartiles, 2),
            f"{times.ttft_ratio:.2f}x",
            f"{times.decode_ratio:.2f}x",
            f"{times.equal_tokens} of {times.new_tokens}",
        )
    return table
