"""Draw a benchmark's report: time to first token by phase, decoding, and steps of several requests."""

import io
from pathlib import Path
from typing import Any

from c2c_export.atomic_file import write_atomically
from c2c_export.bench.report import BenchReport

_PHASES = ("sharer_prefill", "receiver_prefill", "fuse", "rest")
_WIDTH = 0.25


def write_plot(report: BenchReport, path: Path) -> None:
    """Write a `.png` or `.svg` file to `path`, whole or not at all. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    several = bool(report.batches)
    figure = Figure(figsize=(15 if several else 10, 4.5), layout="constrained")
    axes = figure.subplots(1, 3 if several else 2)
    _draw_first_token(report, axes[0])
    _draw_decoding(report, axes[1])
    if several:
        _draw_batches(report, axes[2])
    figure.suptitle(f"{Path(report.bundle.path).name}: {report.bundle.engine} in {report.bundle.precision}")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150)
    write_atomically(path, content.getbuffer())


def _draw_first_token(report: BenchReport, axes: Any) -> None:
    places = range(len(report.prompts))
    bottom = [0.0] * len(report.prompts)
    for phase in _PHASES:
        heights = [max(0.0, getattr(prompt.c2c, phase)) for prompt in report.prompts]
        axes.bar([place - _WIDTH for place in places], heights, _WIDTH, bottom, label=f"C2C: {phase.replace('_', ' ')}")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.bar(places, [prompt.receiver_alone.ttft for prompt in report.prompts], _WIDTH, label="receiver alone")
    if report.reference is not None:
        times = [prompt.ttft for prompt in report.reference.prompts]
        axes.bar([place + _WIDTH for place in places], times, _WIDTH, label="research code")
    _label(report, axes, "time to first token, s")


def _draw_decoding(report: BenchReport, axes: Any) -> None:
    places = range(len(report.prompts))
    axes.bar([p - _WIDTH for p in places], [p.c2c.decode_ms_per_token for p in report.prompts], _WIDTH, label="C2C")
    alone = [prompt.receiver_alone.decode_ms_per_token for prompt in report.prompts]
    axes.bar(places, alone, _WIDTH, label="receiver alone")
    if report.reference is not None:
        times = [prompt.decode_ms_per_token for prompt in report.reference.prompts]
        axes.bar([place + _WIDTH for place in places], times, _WIDTH, label="research code")
    _label(report, axes, "decoding, ms per token")


def _draw_batches(report: BenchReport, axes: Any) -> None:
    for tokens in report.settings.prompt_tokens:
        records = [record for record in report.batches if record.asked_tokens == tokens]
        axes.plot(
            [record.batch for record in records],
            [record.tokens_per_second for record in records],
            marker="o",
            label=f"{tokens} prompt tokens",
        )
    axes.set_xticks(report.settings.batches)
    axes.set_xlabel("requests per step")
    axes.set_ylabel("tokens per second, all requests")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _label(report: BenchReport, axes: Any, what: str) -> None:
    # The bars of a length lie around this: C2C on the left, the research code, if it was measured, on the right.
    middle = 0.0 if report.reference is not None else -_WIDTH / 2
    places = [place + middle for place in range(len(report.prompts))]
    axes.set_xticks(places, [str(prompt.receiver_tokens) for prompt in report.prompts])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(what)
    axes.legend(fontsize="small")
