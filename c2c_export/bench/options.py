"""What `c2c-export bench` is asked for, and the checks that need no engine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from c2c_export.bundle import Manifest
from c2c_export.errors import UsageError, install_command
from engines.cores import check_threads

DEFAULT_PROMPT_TOKENS = (128, 256, 512)
PLOT_SUFFIXES = (".png", ".svg")
MAX_BATCH = 4096
"""Requests that graphs are traced for at most."""


@dataclass(frozen=True)
class ReferenceOptions:
    """Where the research code and what it is to run lie; None takes what the bundle's manifest records."""

    checkout: Path
    """A checkout of thu-nics/C2C."""
    python: Path | None = None
    """The interpreter of an environment with its libraries; None is this one."""
    receiver: str | None = None
    sharers: Sequence[str] = ()
    fusers: Sequence[str] = ()


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; `check_options` says whether it can be."""

    bundle: Path
    engine: str = "ort-cpu"
    precision: str | None = None
    threads: int | None = None
    """Threads of every engine, of the reference and of the machine's own measures; None is one per physical core."""
    prompt_tokens: Sequence[int] = ()
    """Empty takes those of `DEFAULT_PROMPT_TOKENS` that fit."""
    batches: Sequence[int] = ()
    """Empty measures no steps of several requests."""
    new_tokens: int = 32
    repeats: int = 5
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None
    roofline: bool = False
    text_to_text: Path | None = None
    """A bundle of one model, the pair's sharer."""
    reference: ReferenceOptions | None = None
    allow_unchecked: bool = False
    """Do not warn of an engine that was never checked."""
    allow_failed: bool = False
    """Measure an engine although its check failed."""


def check_options(options: BenchOptions) -> None:
    """Raise `UsageError`, naming the option, for what can be seen to be wrong before anything is loaded."""
    least = [("--new-tokens", options.new_tokens, 2), ("--repeats", options.repeats, 1)]
    least.append(("--seed", options.seed, 0))
    least += [("--prompt-tokens", count, 2) for count in options.prompt_tokens]
    least += [("--batch", count, 1) for count in options.batches]
    for name, value, minimum in least:
        if value < minimum:
            raise UsageError(f"{name} {value}: expected at least {minimum}")
    for count in options.batches:
        if count > MAX_BATCH:
            raise UsageError(f"--batch {count}: expected at most {MAX_BATCH} requests")
    if options.threads is not None:
        check_threads("--threads", options.threads)
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent} to write it into")
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder, expected the name of a file to write")
        if path is not None and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise UsageError(f"{path}: the folder {path.absolute().parent} cannot be written into")
    if options.plot is not None:
        if options.plot.suffix not in PLOT_SUFFIXES:
            raise UsageError(f"--plot {options.plot}: expected a name that ends in {' or '.join(PLOT_SUFFIXES)}")
        require("--plot", "matplotlib")
    if options.roofline:
        if options.engine != "ort-cpu":
            raise UsageError(f"--roofline measures this machine's CPU; expected --engine ort-cpu, not {options.engine}")
        require("--roofline", "onnx_ir")
    if options.reference is not None:
        _check_reference(options.reference)


def prompt_lengths(options: BenchOptions, manifest: Manifest) -> list[int]:
    """The prompt lengths to measure, in tokens, the shortest first: memory that was once taken is not given back.

    Raises `UsageError`, naming the length, where one that was asked for does not fit the capacity with the new tokens.
    """
    longest = manifest.max_length - options.new_tokens
    if longest < 2:
        raise UsageError(
            f"--new-tokens {options.new_tokens}: the bundle's capacity is {manifest.max_length} tokens, which leaves "
            "no room for a prompt"
        )
    for count in options.prompt_tokens:
        if count > longest:
            raise UsageError(
                f"--prompt-tokens {count} and --new-tokens {options.new_tokens} exceed the bundle's capacity of "
                f"{manifest.max_length}; ask for at most {longest}, or export with a larger --max-length"
            )
    if options.prompt_tokens:
        return sorted(set(options.prompt_tokens))
    return [count for count in DEFAULT_PROMPT_TOKENS if count <= longest] or [longest]


def require(what: str, *modules: str, extra: str = "bench") -> None:
    """Raise `UsageError` unless the modules that `what` needs are installed; `extra` brings them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"{what} needs {', '.join(missing)}, which the bare install leaves out\n"
            f"Install it with: {install_command(extra)}"
        )


def _check_reference(reference: ReferenceOptions) -> None:
    wrapper = reference.checkout / "rosetta" / "model" / "wrapper.py"
    if not wrapper.is_file():
        raise UsageError(
            f"--reference {reference.checkout}: no checkout of thu-nics/C2C, as it has no rosetta/model/wrapper.py"
        )
    if reference.python is not None and not reference.python.is_file():
        raise UsageError(f"--reference-python {reference.python}: no such interpreter")
    if reference.python is not None and not os.access(reference.python, os.X_OK):
        raise UsageError(f"--reference-python {reference.python}: not a file that can be run")
    if len(reference.sharers) != len(reference.fusers):
        raise UsageError(
            f"{len(reference.sharers)} --sharer and {len(reference.fusers)} --fuser given; expected one --fuser per "
            "--sharer, or none of both"
        )
    # Sources are found with the exporter's own libraries, whatever interpreter runs the research code.
    require("--reference", "torch", "transformers", "safetensors", extra="export")
