"""The command line. Each command fills one typed options object and calls a public function.

This is the one place where the exporting side and `runtime` meet: the commands that serve a bundle import the runtime,
the commands that export one import torch and transformers, each only when it runs.
"""

import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup

from c2c_export import __version__
from c2c_export.bundle import Bundle, FusionMode
from c2c_export.errors import C2CError, UsageError, install_command
from c2c_export.progress import show_step

_FIELD = re.compile(r"[a-z_]+(?=: | is )")
"""What an error about a field of the options begins with."""
_PARAMETERS = {
    "num_slots": "slots",
    "num_threads": "threads",
    "prefix_cache_bytes": "prefix_cache",
    "api_keys": "api_key",
}
"""Of a command, for fields of other names."""


class _Commands(TyperGroup):
    """Lets errors name options as they are typed, where the library names the fields that the options fill."""

    def invoke(self, context: typer.Context) -> object:  # type: ignore[override]  # Typer's own copy of click
        """Run a command. Raises what it raises."""
        try:
            return super().invoke(context)
        except UsageError as error:
            command = self.commands[str(context.invoked_subcommand)]
            options = {parameter.name: parameter.opts[0] for parameter in command.params}
            raise type(error)(_with_option(str(error), options)) from error


def _with_option(message: str, options: Mapping[str, str]) -> str:
    """`message`, which begins with the option of `options` instead of its field, if it begins with one."""
    field = _FIELD.match(message)
    option = options.get(_PARAMETERS.get(field[0], field[0])) if field else None
    return message if field is None or option is None else option + message[field.end() :]


app = typer.Typer(
    cls=_Commands,
    help="Export a Cache-to-Cache pair (two LLMs and a trained fuser) to portable ONNX, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else "[@revision]" in a help text would be taken for markup
)
_console = Console(stderr=True)
_UNBOUNDED_WIDTH = 10_000
"""Columns; tables take what they need of it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: run a command; an error is printed in one or two lines, without a traceback.

    `arguments` None are those of this process; given, another program stands in front, and usage names ours.
    """
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode must not end an answer
    stopped: list[int] = []

    def stop(number: int, _: object) -> NoReturn:
        # As an exception, so that what is half-written is removed on the way out.
        stopped.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # which Typer, and a build in another thread, know
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        app(arguments, prog_name=None if arguments is None else "c2c-export")
    except C2CError as error:
        _end_if(stopped)
        _fail(str(error), error.exit_code)
    except OSError as error:
        _end_if(stopped)
        # What no command could foresee: output into a full disk, a name longer than the system allows.
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    except Exception:
        # A library that is interrupted while it is imported raises what it likes.
        _end_if(stopped)
        raise


def _end_if(stopped: Sequence[int]) -> None:
    if stopped:
        _console.print("stopped")
        sys.exit(128 + stopped[0])


def _fail(message: str, exit_code: int) -> NoReturn:
    _console.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:
        # Else the interpreter tries again at its end, and prints a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_code)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _console.print(Text.assemble(("warning:", "bold yellow"), f" {message}"), soft_wrap=True)


_Bundle = Annotated[Path, typer.Argument(help="A bundle folder.")]
_EngineToRun = Annotated[
    str, typer.Option(help="The engine to run, or auto: the best of the bundle's that this machine can run.")
]
_PrecisionToRun = Annotated[
    Optional[str],  # noqa: UP045 (Typer reads the annotation)
    typer.Option(help="The engine's precision, or auto.  [default: fp32 where the engine has it, else auto]"),
]
_AllowUnchecked = Annotated[
    bool, typer.Option("--allow-unchecked", help="Do not warn of an engine that was never checked.")
]
_AllowFailed = Annotated[bool, typer.Option("--allow-failed", help="Run an engine although its check failed.")]
_Threads = Annotated[Optional[int], typer.Option(help="Threads per engine.  [default: physical cores]")]  # noqa: UP045


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def pair(
    receiver: Annotated[str, typer.Option(help="The receiver: a model folder, a hub id[@revision], or a .gguf file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle folder to write.")],
    sharer: Annotated[
        Optional[list[str]],  # noqa: UP045 (Typer reads the annotation)
        typer.Option(help="A sharer, likewise; repeat for several. Without any the bundle is the receiver's alone."),
    ] = None,
    fuser: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="The fuser checkpoint of each sharer: a folder or a hub id[:subfolder][@revision]."),
    ] = None,
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Capacity of the caches, in tokens.  [default: 2048, or all positions that the models have]"),
    ] = None,
    fusion_mode: Annotated[
        Optional[FusionMode],  # noqa: UP045
        typer.Option(help="How several sharers fuse: parallel or sequential.  [default: the fuser's, else parallel]"),
    ] = None,
    receiver_chat_template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A Jinja file to use instead of the receiver's own chat template."),
    ] = None,
    sharer_chat_template: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="A Jinja file to use instead of each sharer's chat template; one per sharer."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle if it exists.")] = False,
) -> None:
    """Export a receiver, its sharers and their fusers to a bundle of portable ONNX graphs.

    Without --sharer and --fuser the bundle is that of one model, which runs and is built like any other.
    """
    _require("torch", "transformers", "onnxscript", "onnx", "gguf", "safetensors", extra="export")
    from c2c_export.pair import PairOptions, export_pair

    options = PairOptions(
        receiver=receiver,
        sharers=sharer or (),
        fusers=fuser or (),
        output=output,
        max_length=max_length,
        fusion_mode=fusion_mode,
        receiver_chat_template=receiver_chat_template,
        sharer_chat_templates=sharer_chat_template or (),
        overwrite=overwrite,
    )
    bundle = export_pair(options, _step)
    _console.print(Text(f"Wrote {bundle}. Next: c2c-export inspect {bundle}"), soft_wrap=True)


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder; the engines are added to it.")],
    engine: Annotated[str, typer.Option(help="What to build for: ort-cpu, tensorrt-rtx, tensorrt or ort-cuda.")],
    precision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Number format: fp16 or bf16 on GPUs, fp32 on ort-cpu; int8 or int4 for weights in integers and the "
            "rest in fp16, on ort-cpu in fp32.  [default: fp16, on ort-cpu fp32]"
        ),
    ] = None,
    max_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Requests that one decode step serves at most.  [default: 8]"),
    ] = None,
    decode_optimum: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Requests of a decode step that kernels are chosen for.  [default: 1]"),
    ] = None,
    compute_capability: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="A GPU generation to build for, such as 8.9; repeat for several in one engine. tensorrt-rtx only.  "
            "[default: every one from 8.0 on]"
        ),
    ] = None,
    prefill_optimum: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Prompt tokens that kernels are chosen for.  [default: 512, or the capacity if smaller]"),
    ] = None,
    fuse_optimum: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Fused tokens that kernels are chosen for.  [default: 512, or the capacity if smaller]"),
    ] = None,
    keep_onnx: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep the lowered ONNX graphs in this folder."),
    ] = None,
    timing_cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="A file with TensorRT's measurements of kernels, read and updated. tensorrt only.  "
            "[default: one per version and GPU in the cache folder]"
        ),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even if nothing changed.")] = False,
) -> None:
    """Build engines of every graph of a bundle, for one target and precision.

    tensorrt-rtx builds on any machine, for any RTX GPU. tensorrt builds on the GPU machine, for its GPU. What a target
    refuses is checked first; `c2c-export doctor` lists it. Ctrl-C stops a build and leaves the bundle as it was.
    """
    _require("onnx", "onnx_ir", "onnxscript", extra=engine if engine in ("tensorrt", "tensorrt-rtx") else "build")
    from c2c_export.build import build as build_engines
    from c2c_export.build_plan import BuildOptions
    from c2c_export.progress import BuildDisplay
    from engines.targets import default_precision

    options = BuildOptions(
        bundle=bundle,
        target=engine,
        precision=precision or default_precision(engine),
        max_batch=max_batch,
        decode_optimum=decode_optimum,
        compute_capabilities=compute_capability or (),
        prefill_optimum=prefill_optimum,
        fuse_optimum=fuse_optimum,
        keep_onnx=keep_onnx,
        timing_cache=timing_cache,
        rebuild=rebuild,
    )
    with BuildDisplay(_console) as display:
        result = build_engines(options, display.step, display)
    what = f"Built {result.name}" if result.built else f"{result.name} is there already and nothing changed"
    _console.print(Text(f"{what}. Next: c2c-export inspect {bundle}"), soft_wrap=True)


@app.command()
def inspect(
    bundle: _Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead.")] = False,
) -> None:
    """Show a bundle: models, layer map with gates, graphs, passes, engines."""
    from c2c_export.inspect import print_bundle

    opened = Bundle.open(bundle)
    if as_json:
        print(opened.manifest.model_dump_json(indent=1))
    else:
        print_bundle(opened, _output())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead.")] = False,
) -> None:
    """Show what this machine can build and run, and why not."""
    from c2c_export.doctor import examine, print_report, to_json

    report = examine()
    if as_json:
        print(to_json(report))
    else:
        print_report(report, _output())


@app.command()
def check(
    bundle: _Bundle,
    receiver: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The trained receiver, as given to pair.  [default: what the bundle was exported from]"),
    ] = None,
    sharer: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A trained sharer; repeat for several.  [default: likewise]"),
    ] = None,
    fuser: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="The fuser of each sharer.  [default: likewise]"),
    ] = None,
    receiver_chat_template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The Jinja file that was given to pair, if it lies elsewhere now."),
    ] = None,
    sharer_chat_template: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Likewise, one per sharer."),
    ] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Check this engine only, such as ort-cpu.  [default: every engine of the bundle]"),
    ] = None,
    precision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Check this precision only.  [default: every one of the engine]"),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A JSON Lines file of prompts, messages or input_ids.  [default: some that come with us]"),
    ] = None,
    level: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Run this level only; repeatable. A pass counts only when all levels ran.  [default: all]"),
    ] = None,
    questions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A JSON Lines file of questions with choices, to score receiver, sharers and C2C."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate greedily for each prompt.")] = 32,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the node and the module where a graph first diverges.")
    ] = False,
    report: Annotated[Optional[Path], typer.Option(help="Write the report to this file, as HTML.")] = None,  # noqa: UP045
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Write the report to this file, as JSON."),
    ] = None,
    save_results: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Save both sides' outputs of every graph in this folder, for polygraphy inspect data."),
    ] = None,
    threads: _Threads = None,
) -> None:
    """Check that a bundle's engines compute what the trained models compute, level by level.

    The result is kept in the manifest: an engine that failed is not run any more unless that is allowed. Exits with 0
    only if every engine that was asked for passed, with 1 if one failed.
    """
    _require("torch", "transformers", "polygraphy", extra="check")
    from c2c_export.check.options import CheckOptions
    from c2c_export.check.run import run_check
    from c2c_export.check.show import print_report

    options = CheckOptions(
        bundle=bundle,
        receiver=receiver,
        sharers=sharer or (),
        fusers=fuser or (),
        receiver_chat_template=receiver_chat_template,
        sharer_chat_templates=sharer_chat_template or (),
        engine=engine,
        precision=precision,
        prompts=prompts,
        **({} if level is None else {"levels": level}),  # type: ignore[arg-type]  # checked when it runs
        questions=questions,
        new_tokens=new_tokens,
        bisect=bisect,
        report=report,
        json_file=json_file,
        save_results=save_results,
        num_threads=threads,
    )
    result = run_check(options, _step)
    print_report(result, _output())
    if result.problems:
        raise C2CError("\n".join(result.problems))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def generate(
    bundle: _Bundle,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the user says.")],
    system: Annotated[Optional[str], typer.Option(help="A system message before it.")] = None,  # noqa: UP045
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Use the sharers, or the receiver alone.")] = True,
    sharer: Annotated[Optional[list[int]], typer.Option(help="Use only this sharer; repeatable.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens to generate at most.  [default: up to the bundle's capacity]"),
    ] = None,
    stop: Annotated[Optional[list[str]], typer.Option(help="Stop before this text; repeatable.")] = None,  # noqa: UP045
    temperature: Annotated[Optional[float], typer.Option(help="Sample with this temperature.")] = None,  # noqa: UP045
    top_k: Annotated[Optional[int], typer.Option(help="Sample among the k most probable tokens.")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(help="Sample within this probability mass.")] = None,  # noqa: UP045
    min_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Sample among tokens this probable relative to the best."),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Penalise repeated tokens; 1.0 is off.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(help="Seed for sampling.")] = None,  # noqa: UP045
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after stop tokens.")] = False,
    engine: _EngineToRun = "ort-cpu",
    precision: _PrecisionToRun = None,
    threads: _Threads = None,
    allow_unchecked: _AllowUnchecked = False,
    allow_failed: _AllowFailed = False,
    timings: Annotated[bool, typer.Option("--timings", help="Print timings to stderr.")] = False,
) -> None:
    """Answer a prompt, streaming the text."""
    from runtime import C2CPipeline

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    pipeline = C2CPipeline.from_bundle(
        bundle,
        engine,
        precision,
        num_slots=1,
        num_threads=threads,
        allow_unchecked=allow_unchecked,
        allow_failed=allow_failed,
    )
    if "auto" in (engine, precision):
        _console.print(Text(f"engine: {pipeline.engine_choice.reason}"), soft_wrap=True)
    chunks = pipeline.stream(
        messages,
        fuse=fuse,
        sharers=sharer or None,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    generation = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        generation = chunk.generation
    print()
    if timings and generation is not None:
        spent = generation.timings
        _console.print(
            f"sharer prefill {spent.sharer_prefill:.3f} s, receiver prefill {spent.receiver_prefill:.3f} s, "
            f"fuse {spent.fuse:.3f} s, first token after {spent.ttft:.3f} s, "
            f"{len(generation.token_ids) - 1} further tokens in {spent.decode:.3f} s",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def serve(
    bundle: _Bundle,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    engine: _EngineToRun = "ort-cpu",
    precision: _PrecisionToRun = None,
    threads: _Threads = None,
    slots: Annotated[int, typer.Option(help="Requests that are served at once.")] = 8,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait for a slot; further ones are answered with 429.")
    ] = 64,
    max_stall: Annotated[
        float,
        typer.Option(
            help="Seconds that answers may pause for another request's prompt; not kept where the receiver's heads are "
            "wider than 128."
        ),
    ] = 0.2,
    prefix_cache: Annotated[
        int, typer.Option(help="MiB of memory for what prompts have in common with former ones; 0 is none.", min=0)
    ] = 512,
    model_name: Annotated[
        Optional[str],  # noqa: UP045 (Typer reads the annotation)
        typer.Option(
            help='The model\'s name in the API; the receiver alone is this with "-receiver" behind it.  '
            "[default: the bundle folder's name without its ending]"
        ),
    ] = None,
    api_key: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Ask for one of these keys, or of those in the environment variable C2C_EXPORT_API_KEYS, with spaces "
            "between, which other users of the machine do not see; repeatable.  [default: none is asked for]",
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes that the body of a request may have.")] = 1 << 20,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens that one answer may ask for.  [default: the bundle's capacity]"),
    ] = None,
    max_priority: Annotated[int, typer.Option(help="The highest priority that a request may have, -100 to 100.")] = 0,
    max_connections: Annotated[
        int, typer.Option(help="Connections at once, idle ones included; further ones are answered with 503.")
    ] = 1000,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included; 0 is any.")] = 600,
    drain: Annotated[
        float, typer.Option(help="Seconds that running requests have to finish after SIGTERM or Ctrl-C.")
    ] = 30,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what was asked and answered.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    ray_config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Serve nothing, but write a configuration to this YAML file, a new one, for `serve run` or `serve "
            "deploy` on a Ray cluster."
        ),
    ] = None,
    ray_layout: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="With --ray-config: whole, replicas of the whole pipeline; or disaggregated, sharers with replicas of "
            "their own.",
            show_default="whole",
        ),
    ] = None,
    allow_unchecked: _AllowUnchecked = False,
    allow_failed: _AllowFailed = False,
) -> None:
    """Serve a bundle over HTTP: OpenAI's API for chats and completions, metrics, and a page for the browser.

    Logs are JSON lines on stdout. SIGTERM or Ctrl-C ends it when the running requests are done; a second one at once.
    """
    _require("fastapi", "uvicorn", "prometheus_client", extra="serve")
    if ray_config is not None:
        _require("yaml", extra="ray")
    elif ray_layout is not None:
        raise UsageError("--ray-layout is of the configuration that --ray-config writes; give both, or neither")
    from runtime.scheduler_options import SchedulerOptions
    from runtime.server.serve import ServeOptions
    from runtime.server.serve import serve as run_server
    from runtime.server.settings import ServerSettings, keys_of_environment

    options = ServeOptions(
        bundle=bundle,
        host=host,
        port=port,
        engine=engine,
        precision=precision,
        num_threads=threads,
        num_slots=slots,
        allow_unchecked=allow_unchecked,
        allow_failed=allow_failed,
        scheduler=SchedulerOptions(
            max_waiting=max_waiting, max_stall=max_stall, prefix_cache_bytes=prefix_cache * 2**20
        ),
        settings=ServerSettings(
            model_name=model_name,
            api_keys=(*(api_key or ()), *keys_of_environment()),
            max_body=max_body,
            max_tokens=max_tokens,
            max_choices=max(max_waiting, 1),
            max_priority=max_priority,
            timeout=timeout,
            log_prompts=log_prompts,
        ),
        drain=drain,
        max_connections=max_connections,
        log_level=log_level,
    )
    if ray_config is None:
        run_server(options, lambda text: _console.print(Text(text), soft_wrap=True))
        return
    from runtime.server.ray.config import ray_arguments, ray_config_of, warn_of_too_few_cpus

    if ray_config.is_file():
        raise UsageError(f"--ray-config {ray_config}: exists already, maybe edited; remove it or name another file")
    arguments = ray_arguments(options, ray_layout or "whole")
    ray_config.write_text(ray_config_of(arguments, host, port), encoding="utf-8")
    warn_of_too_few_cpus(arguments)
    _console.print(Text(f"Wrote {ray_config}; deploy it with: serve run {ray_config}"), soft_wrap=True)


@app.command()
def bench(
    bundle: _Bundle,
    engine: _EngineToRun = "ort-cpu",
    precision: _PrecisionToRun = None,
    threads: _Threads = None,
    allow_unchecked: _AllowUnchecked = False,
    allow_failed: _AllowFailed = False,
    prompt_tokens: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Length of a prompt; repeatable.  [default: those of 128, 256, 512 that fit the capacity]"),
    ] = None,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Measure decode steps that serve so many requests at once; repeatable."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of everything, of which medians are taken.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Write the report to this file, as JSON."),
    ] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw the report to this .png or .svg file.")] = None,  # noqa: UP045
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Measure the machine's own speed, and how near each phase comes.")
    ] = False,
    text_to_text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Compare with text-to-text, in which the sharer writes a hint of up to 64 tokens and the receiver "
            "reads it. A bundle of the sharer alone: c2c-export pair --receiver SHARER -o BUNDLE"
        ),
    ] = None,
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Compare with the research code: a checkout of thu-nics/C2C, run in a process of its own."),
    ] = None,
    reference_python: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The interpreter that has the research code's libraries.  [default: this one]"),
    ] = None,
    receiver: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The receiver for --reference.  [default: what the bundle was exported from]"),
    ] = None,
    sharer: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A sharer for --reference; repeat for several.  [default: likewise]"),
    ] = None,
    fuser: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="The fuser of each sharer for --reference.  [default: likewise]"),
    ] = None,
) -> None:
    """Measure a bundle: time to first token by phase, decoding, memory; by prompt length and requests.

    Beside it the receiver alone, and on demand text-to-text, the research code, and what the machine can do. Times are
    medians; leave the machine to it alone.
    """
    from c2c_export.atomic_file import write_atomically
    from c2c_export.bench.options import BenchOptions, ReferenceOptions
    from c2c_export.bench.run import run_bench
    from c2c_export.bench.show import print_report

    if reference is None and (receiver or sharer or fuser or reference_python):
        raise UsageError("--receiver, --sharer, --fuser and --reference-python are for --reference, which is not given")
    options = BenchOptions(
        bundle=bundle,
        engine=engine,
        precision=precision,
        threads=threads,
        prompt_tokens=prompt_tokens or (),
        batches=batch or (),
        new_tokens=new_tokens,
        repeats=repeats,
        seed=seed,
        json=json_file,
        plot=plot,
        roofline=roofline,
        text_to_text=text_to_text,
        allow_unchecked=allow_unchecked,
        allow_failed=allow_failed,
        reference=None
        if reference is None
        else ReferenceOptions(reference, reference_python, receiver, sharer or (), fuser or ()),
    )
    report = run_bench(options, _step)
    problems = list(report.problems)
    # Tables, files: what fails of them costs none of the others.
    if json_file is not None:
        try:
            write_atomically(json_file, (report.model_dump_json(indent=1) + "\n").encode())
        except OSError as error:
            problems.append(f"--json {json_file}: cannot be written: {error.strerror}")
    print_report(report, _output())
    if plot is not None:
        from c2c_export.bench.plot import write_plot

        try:
            write_plot(report, plot)
        except OSError as error:
            problems.append(f"--plot {plot}: cannot be written: {error.strerror}")
    if report.interrupted:
        for problem in problems:
            _console.print(escape(problem), soft_wrap=True)
        raise typer.Exit(128 + signal.SIGINT)
    if problems:
        raise C2CError("\n".join(problems))


def _output() -> Console:
    """The console for tables on stdout: as wide as the terminal, or as the tables where there is none to be wide."""
    return Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED_WIDTH)


def _step(description: str) -> AbstractContextManager[None]:
    return show_step(_console, description, lambda: _console.status(escape(description)))


def _require(*modules: str, extra: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this command needs {', '.join(missing)}, which the bare install leaves out\n"
            f"Install them with: {install_command(extra)}"
        )


if __name__ == "__main__":
    main()
