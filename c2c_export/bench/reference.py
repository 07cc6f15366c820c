"""The research code beside the bundle, on the same prompts: prompts and sources in, its times and their ratios out.

The process itself is `c2c_export.bench.reference_process`. It is given the token ids that the bundle's plan has, so
tokenising and aligning cost it nothing here.
"""

import dataclasses
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from c2c_export.bench import reference_process
from c2c_export.bench.measure import MeasuredPrompt, quartiles
from c2c_export.bench.options import ReferenceOptions
from c2c_export.bench.reference_process import ReferencePrompt, ReferenceRequest, ReferenceResult, ReferenceRun
from c2c_export.bench.report import ReferenceRecord, ReferenceTimes
from c2c_export.bundle import Manifest
from c2c_export.errors import C2CError, UsageError, one_line, reason_of
from runtime.prompt import ModelTokens, Plan

_PADDING = 0
"""Any id: nothing attends to padding."""
_MAX_REASON = 300
_FIND_SECONDS = 3600.0
"""For finding the models, downloads included."""
_LOAD_SECONDS = 1800.0
_TIMES_OURS = 50.0
"""How much longer than the bundle the research code may take. Three to seven times are usual."""


@dataclass(frozen=True)
class ReferenceSources:
    """Local folders of what the research code is to run, in the order of the bundle's sharers."""

    receiver: Path
    sharers: tuple[Path, ...]
    fusers: tuple[Path, ...]


def find_sources(options: ReferenceOptions, manifest: Manifest) -> ReferenceSources:
    """The models and fusers, downloaded or converted where need be; those not given are those of the manifest.

    That loads torch, so it is done in a process of its own. Raises `UsageError` when they are not there, or when the
    bundle has no sharer, and `C2CError` when the process dies or takes more than an hour.
    """
    if not manifest.sharers:
        raise UsageError("--reference: the bundle has no sharer, and the research code runs pairs")
    sharers = options.sharers or [sharer.model.source for sharer in manifest.sharers]
    fusers = options.fusers or [sharer.fuser_source for sharer in manifest.sharers]
    if len(sharers) != len(manifest.sharers):
        raise UsageError(f"{len(sharers)} --sharer given, expected {len(manifest.sharers)} as in the bundle")
    receiver = options.receiver or manifest.receiver.source
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_sources, args=(there, receiver, sharers, fusers), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(_FIND_SECONDS):
            raise C2CError(
                f"--reference: its models were not there after {_FIND_SECONDS / 60:.0f} minutes; download them before, "
                "and name their folders with --receiver, --sharer and --fuser"
            )
        found = here.recv()
    except EOFError:
        raise C2CError("--reference: the process that looks for its models died; is there enough memory?") from None
    finally:
        process.terminate()  # a download that is interrupted would go on
        process.join()
    if isinstance(found, C2CError):
        raise found
    assert isinstance(found, ReferenceSources)
    return found


def make_request(
    options: ReferenceOptions,
    sources: ReferenceSources,
    fusion_mode: str,
    plans: Sequence[Plan],
    *,
    threads: int,
    new_tokens: int,
    repeats: int,
) -> ReferenceRequest:
    """What the process is asked."""
    return ReferenceRequest(
        checkout=str(options.checkout.absolute()),
        receiver=str(sources.receiver),
        sharers=[str(source) for source in sources.sharers],
        fusers=[str(source) for source in sources.fusers],
        fusion_mode=fusion_mode,
        threads=threads,
        new_tokens=new_tokens,
        repeats=repeats,
        prompts=[padded_prompt(plan) for plan in plans],
    )


def seconds_allowed(measured: Sequence[MeasuredPrompt], new_tokens: int, repeats: int) -> float:
    """How many seconds the research code may take for what the bundle was measured with: half an hour to load, and
    fifty times what the bundle took for as many runs."""
    ours = (prompt.record.c2c for prompt in measured)
    run_seconds = sum(times.ttft + 1e-3 * (new_tokens - 1) * times.decode_ms_per_token for times in ours)
    return _LOAD_SECONDS + _TIMES_OURS * (repeats + 1) * run_seconds


def run_reference(request: ReferenceRequest, python: Path | None, seconds: float) -> ReferenceResult:
    """Run the process with the interpreter `python`, by default this one, for at most so many seconds.

    Raises `C2CError` with the process's last line when it fails, with what it gave that is no result, or when it takes
    longer, in which case it is killed.
    """
    interpreter = str(python or sys.executable)
    command = [interpreter, "-P", str(Path(reference_process.__file__))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(request)),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise C2CError(
            f"{request.checkout}: the research code was not done after {seconds / 60:.0f} minutes, expected at most "
            f"{_TIMES_OURS:.0f} times what the bundle took; is there enough memory? Shorter --prompt-tokens take less"
        ) from None
    except OSError as error:
        raise C2CError(f"{interpreter}: cannot be run as an interpreter: {error.strerror}") from error
    if done.returncode:
        last = one_line((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1], _MAX_REASON)
        raise C2CError(f"{request.checkout}: the research code failed: {last}")
    try:
        return _parse_result(done.stdout, request)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise C2CError(
            f"{interpreter}: gave no result, expected a Python interpreter that has the research code's libraries"
        ) from error


def _parse_result(text: str, request: ReferenceRequest) -> ReferenceResult:
    """A result from its JSON. Raises `C2CError` where the research code did less than it was asked."""
    content = json.loads(text)
    result = ReferenceResult(**{**content, "runs": [ReferenceRun(**run) for run in content["runs"]]})
    if len(result.runs) != len(request.prompts):
        raise C2CError(
            f"{request.checkout}: the research code ran {len(result.runs)} prompts, expected {len(request.prompts)}"
        )
    for run, prompt in zip(result.runs, request.prompts, strict=True):
        steps = request.repeats * (request.new_tokens - 1)
        repeats = {len(run.ttft), len(run.sharer_prefill), len(run.receiver_prefill)}
        if (repeats, len(run.token_ids), len(run.steps)) != ({request.repeats}, request.new_tokens, steps):
            raise C2CError(
                f"{request.checkout}: the research code generated {len(run.token_ids)} tokens after "
                f"{len(prompt.ids[0])} and was timed {len(run.ttft)} times, {len(run.steps)} steps in all; expected "
                f"{request.new_tokens}, {request.repeats} and {steps}"
            )
    return result


def compare(result: ReferenceResult, measured: Sequence[MeasuredPrompt], checkout: str) -> ReferenceRecord:
    """Relate the research code's times, and its tokens, to what the bundle gave for the same prompts."""
    times = []
    for run, found in zip(result.runs, measured, strict=True):
        prompt, ours = found.record, found.token_ids
        differ = (i for i, (a, b) in enumerate(zip(run.token_ids, ours, strict=True)) if a != b)
        first_token, milliseconds = median(run.ttft), [1000 * seconds for seconds in run.steps]
        times.append(
            ReferenceTimes(
                asked_tokens=prompt.asked_tokens,
                ttft=first_token,
                ttft_range=(min(run.ttft), max(run.ttft)),
                sharer_prefill=median(run.sharer_prefill),
                receiver_prefill=median(run.receiver_prefill),
                fuse=median(
                    total - sharer - receiver
                    for total, sharer, receiver in zip(run.ttft, run.sharer_prefill, run.receiver_prefill, strict=True)
                ),
                decode_ms_per_token=median(milliseconds),
                decode_ms_quartiles=quartiles(milliseconds),
                ttft_ratio=first_token / prompt.c2c.ttft,
                decode_ratio=median(milliseconds) / prompt.c2c.decode_ms_per_token,
                equal_tokens=next(differ, len(ours)),
                new_tokens=len(ours),
            )
        )
    return ReferenceRecord(
        checkout=checkout, versions=result.versions, prompts=tuple(times), peak_bytes=result.peak_bytes
    )


def padded_prompt(plan: Plan) -> ReferencePrompt:
    """A plan's prompt with its padding, which the research code computes."""

    def row(tokens: ModelTokens) -> tuple[list[int], list[int]]:
        ids, mask = [_PADDING] * plan.num_positions, [0] * plan.num_positions
        for token, position in zip(tokens.ids.tolist(), tokens.position_ids.tolist(), strict=True):
            ids[position], mask[position] = token, 1
        return ids, mask

    rows = [row(tokens) for tokens in (plan.receiver, *(plan.sharers[number] for number in sorted(plan.sharers)))]
    if plan.closing_padding_id is not None:
        rows[0][0][-1] = plan.closing_padding_id
    return ReferencePrompt(
        ids=[ids for ids, _ in rows],
        attention_masks=[mask for _, mask in rows],
        sections=[(section.stop - section.start, section.fused) for section in plan.sections],
    )


def _send_sources(connection: Connection, receiver: str, sharers: Sequence[str], fusers: Sequence[str]) -> None:
    """Send what `_find_sources` gives, or the error that it raises."""
    try:
        connection.send(_find_sources(receiver, sharers, fusers))
    except C2CError as error:
        connection.send(error)
    except Exception as error:
        connection.send(C2CError(f"--reference: {type(error).__name__}: {reason_of(error)}"))


def _find_sources(receiver: str, sharers: Sequence[str], fusers: Sequence[str]) -> ReferenceSources:
    from c2c_export.sources import resolve_fuser, resolve_model

    return ReferenceSources(
        _local(resolve_model, receiver, "--receiver"),
        tuple(_local(resolve_model, source, "--sharer") for source in sharers),
        tuple(_local(resolve_fuser, source, "--fuser") for source in fusers),
    )


def _local(resolve: Callable[[str], Path], source: str, option: str) -> Path:
    try:
        return resolve(source).absolute()
    except C2CError as error:
        raise UsageError(f"--reference: {error}; name it with {option}") from error
