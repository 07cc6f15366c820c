"""`c2c-export pair`: two or more language models and their fusers in, a bundle out.

The order is: everything that can be wrong with the input is checked before anything is traced; then each model is
loaded, traced, passed through `c2c_export.passes`, saved and freed; then the fusers. The bundle is built beside its
final place and renamed into it, so a failure leaves nothing behind.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedTokenizerBase

from c2c_export import __version__
from c2c_export.alignment import compile_alignment
from c2c_export.bundle import (
    SCHEMA_VERSION,
    EngineRecord,
    FusionMode,
    GraphRecord,
    LayerLink,
    Manifest,
    ModelRecord,
    SharerRecord,
    TensorSpec,
    hash_folder,
    write_manifest,
)
from c2c_export.checkpoint import FuserCheckpoint, check_fuser_fits, read_fuser
from c2c_export.errors import C2CError, UsageError
from c2c_export.models import ModelShape, load_weights, model_record, read_config, read_stop_ids, shape_of
from c2c_export.passes import FUSER_PASSES, RECEIVER_PASSES, Pass, apply_passes, sharer_passes
from c2c_export.passes.prune_sharer import CacheName
from c2c_export.quiet import quiet_libraries
from c2c_export.sources import resolve_fuser, resolve_model
from c2c_export.tokenizer import BundledTokenizer
from c2c_export.tokenizer_source import choose_chat_template, load_tokenizer, write_tokenizer
from c2c_export.trace.decoder import trace_decoder
from c2c_export.trace.fuser import CacheShape, trace_fuser

Step = Callable[[str], AbstractContextManager[object]]
"""Called with a description; the work that it describes is done inside the returned context."""

_MIN_LENGTH = 16
_VERSIONED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tokenizers")


@dataclass(frozen=True)
class PairOptions:
    """What to export. `sharers`, `fusers` and, if given, `sharer_chat_templates` go together by position."""

    receiver: str
    sharers: Sequence[str]
    fusers: Sequence[str]
    output: Path
    max_length: int = 2048
    fusion_mode: FusionMode | None = None
    """None takes what the first fuser's configuration names, else "parallel"."""
    receiver_chat_template: Path | None = None
    sharer_chat_templates: Sequence[Path] = field(default=())
    overwrite: bool = False


@dataclass(frozen=True)
class _Model:
    """A language model, resolved and checked, its weights not yet loaded."""

    source: str
    folder: Path
    config: Any
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    record: ModelRecord


def export_pair(options: PairOptions, step: Step) -> Path:
    """Export the pair and return the bundle's folder.

    Raises `UsageError` for wrong options and `C2CError` for anything that the models, the fusers or the machine lack.
    """
    _check_options(options)
    with quiet_libraries():
        return _export_pair(options, step)


def _export_pair(options: PairOptions, step: Step) -> Path:
    with step("Reading models and fusers"):
        fusers = [read_fuser(resolve_fuser(source)) for source in options.fusers]
        trained_with = [fuser.folder for fuser in fusers]
        overrides: Sequence[Path | None] = options.sharer_chat_templates or [None] * len(fusers)
        receiver = _read_model(
            options.receiver, options.receiver_chat_template, trained_with[0] / "receiver_chat_template.jinja"
        )
        sharers = [
            _read_model(source, override, folder / "sharer_chat_template.jinja")
            for source, override, folder in zip(options.sharers, overrides, trained_with, strict=True)
        ]
        _check_pairs(receiver, sharers, fusers)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{options.output.name}.partial-", dir=options.output.parent))
    except OSError as error:
        raise UsageError(f"{options.output}: cannot write there: {error.strerror}") from error
    try:
        _write_bundle(partial, options, receiver, sharers, fusers, step)
        partial.chmod(0o755)
        _move_into_place(partial, options)
    except OSError as error:
        # numpy reports a full disk without an errno, so the free space is looked at too
        full = shutil.disk_usage(options.output.parent).free < 2**20
        reason = "the disk is full" if full else str(error)
        raise C2CError(f"{options.output}: writing the bundle failed: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return options.output


def _check_options(options: PairOptions) -> None:
    if not options.sharers or len(options.sharers) != len(options.fusers):
        raise UsageError(
            f"{len(options.sharers)} sharer(s) and {len(options.fusers)} fuser(s) given; "
            "expected one --fuser per --sharer"
        )
    if options.sharer_chat_templates and len(options.sharer_chat_templates) != len(options.sharers):
        raise UsageError(
            f"{len(options.sharer_chat_templates)} --sharer-chat-template given for {len(options.sharers)} sharers; "
            "expected none or one for each"
        )
    if options.max_length < _MIN_LENGTH:
        raise UsageError(f"--max-length {options.max_length}: expected at least {_MIN_LENGTH}")
    if options.fusion_mode not in (None, "parallel", "sequential"):
        raise UsageError(f"--fusion-mode {options.fusion_mode}: expected parallel or sequential")
    if options.output.exists() and not options.overwrite:
        raise UsageError(f"{options.output} exists already; choose another output or pass --overwrite")
    if options.output.exists() and not (options.output / "manifest.json").is_file() and not _is_empty(options.output):
        raise UsageError(f"{options.output} exists and is not a bundle; --overwrite replaces bundles only")
    if not options.output.parent.is_dir():
        raise UsageError(f"{options.output.parent}: no such folder to write the bundle into")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _read_model(source: str, template: Path | None, trained_with: Path) -> _Model:
    folder = resolve_model(source)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    chat_template, origin = choose_chat_template(
        tokenizer, source, template, trained_with if trained_with.is_file() else None
    )
    shape = shape_of(config)
    record = model_record(source, folder, shape, origin)
    return _Model(source, folder, config, shape, tokenizer, chat_template, record)


def _check_pairs(receiver: _Model, sharers: Sequence[_Model], fusers: Sequence[FuserCheckpoint]) -> None:
    for sharer, fuser in zip(sharers, fusers, strict=True):
        check_fuser_fits(
            fuser,
            receiver_layers=receiver.shape.num_layers,
            receiver_num_key_value_heads=receiver.shape.num_key_value_heads,
            receiver_head_dim=receiver.shape.head_dim,
            sharer_layers=sharer.shape.num_layers,
            sharer_num_key_value_heads=sharer.shape.num_key_value_heads,
            sharer_head_dim=sharer.shape.head_dim,
        )
        if fuser.aligned != fusers[0].aligned:
            raise C2CError(
                f"{fuser.folder / 'config.json'}: is_do_alignment is {fuser.aligned}, but {fusers[0].folder} says "
                f"{fusers[0].aligned}; the fusers of one bundle must agree"
            )
        if not fuser.aligned and sharer.shape.vocab_size < len(receiver.tokenizer):
            raise C2CError(
                f"{sharer.source}: its vocabulary of {sharer.shape.vocab_size} does not cover the receiver's "
                f"{len(receiver.tokenizer)} tokens, but {fuser.folder} was trained without alignment"
            )


def _write_bundle(
    root: Path,
    options: PairOptions,
    receiver: _Model,
    sharers: Sequence[_Model],
    fusers: Sequence[FuserCheckpoint],
    step: Step,
) -> None:
    aligned = fusers[0].aligned
    mode = options.fusion_mode or fusers[0].fusion_mode or "parallel"
    stop_ids = read_stop_ids(receiver.folder, receiver.config, receiver.tokenizer.eos_token_id)
    for name in ("graphs", "alignment", "tokenizers"):
        (root / name).mkdir()
    receiver_tokenizer = _write_tokenizer(receiver, root / "tokenizers" / "receiver")
    if aligned:
        for number, (sharer, fuser) in enumerate(zip(sharers, fusers, strict=True)):
            with step(f"Compiling the token alignment for sharer {number}"):
                tokenizer = _write_tokenizer(sharer, root / "tokenizers" / f"sharer{number}")
                _write_alignment(root, number, receiver, receiver_tokenizer, sharer, tokenizer, fuser)

    receiver_graph = _export_decoder(root, "receiver", receiver, RECEIVER_PASSES, options.max_length, step)
    records = []
    for number, (sharer, fuser) in enumerate(zip(sharers, fusers, strict=True)):
        separate = mode == "parallel" and len(sharers) > 1
        records.append(
            _export_sharer(root, number, receiver, sharer, fuser, options, separate_unfused=separate, step=step)
        )
    graphs = {"receiver": receiver_graph.path}
    for number, record in enumerate(records):
        if record.sharer_graph is not None and record.fuser_graph is not None:
            graphs |= {f"sharer{number}": record.sharer_graph.path, f"fuser{number}": record.fuser_graph.path}
    with step("Hashing the bundle"):
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            tool_versions={"c2c-export": __version__, **{n: importlib.metadata.version(n) for n in _VERSIONED}},
            max_length=options.max_length,
            aligned=aligned,
            fusion_mode=mode,
            stop_ids=stop_ids,
            receiver=receiver.record,
            receiver_graph=receiver_graph,
            sharers=tuple(records),
            # ONNX Runtime's CPU provider runs the portable graphs themselves
            engines={"ort-cpu-fp32": EngineRecord(target="ort-cpu", precision="fp32", graphs=graphs)},
            files=hash_folder(root),
        )
        write_manifest(root, manifest)


def _write_tokenizer(model: _Model, folder: Path) -> BundledTokenizer:
    write_tokenizer(model.tokenizer, model.chat_template, folder)
    return BundledTokenizer.load(folder)


def _write_alignment(
    root: Path,
    number: int,
    receiver: _Model,
    receiver_tokenizer: BundledTokenizer,
    sharer: _Model,
    sharer_tokenizer: BundledTokenizer,
    fuser: FuserCheckpoint,
) -> None:
    vocab = max(receiver.shape.vocab_size, receiver_tokenizer.vocab_size)
    table = compile_alignment(
        receiver_tokenizer, sharer_tokenizer, receiver_vocab=vocab, strategy=fuser.alignment_strategy
    )
    if int(table.max()) >= sharer.shape.vocab_size:
        raise C2CError(
            f"{sharer.source}: its tokenizer gives id {int(table.max())}, but the model knows {sharer.shape.vocab_size}"
        )
    np.save(root / "alignment" / f"sharer{number}.npy", table)


def _export_sharer(
    root: Path,
    number: int,
    receiver: _Model,
    sharer: _Model,
    fuser: FuserCheckpoint,
    options: PairOptions,
    *,
    separate_unfused: bool,
    step: Step,
) -> SharerRecord:
    links = tuple(
        LayerLink(
            receiver_layer=link.receiver_layer,
            sharer_layer=link.sharer_layer,
            projector=link.projector,
            key_gate_open=fuser.projectors[link.projector].key_gate_open,
            value_gate_open=fuser.projectors[link.projector].value_gate_open,
        )
        for link in fuser.links
    )
    read: frozenset[CacheName] = frozenset(
        (link.sharer_layer, kind)
        for link in links
        for kind, is_open in (("key", link.key_gate_open), ("value", link.value_gate_open))
        if is_open
    )
    sharer_graph = fuser_graph = None
    if read:
        sharer_graph = _export_decoder(root, f"sharer{number}", sharer, sharer_passes(read), options.max_length, step)
        with step(f"Tracing fuser {number} ({len(links)} projectors)"):
            graph = trace_fuser(
                fuser,
                CacheShape(sharer.shape.num_key_value_heads, sharer.shape.head_dim),
                CacheShape(receiver.shape.num_key_value_heads, receiver.shape.head_dim),
                options.max_length,
                separate_unfused=separate_unfused,
            )
            fuser_graph = _save_graph(root, f"fuser{number}", graph, FUSER_PASSES)
    return SharerRecord(
        model=sharer.record,
        fuser_source=str(options.fusers[number]),
        fuser_sources=fuser.files,
        alignment_strategy=fuser.alignment_strategy if fuser.aligned else None,
        links=links,
        sharer_graph=sharer_graph,
        fuser_graph=fuser_graph,
    )


def _export_decoder(
    root: Path, name: str, model: _Model, passes: Sequence[tuple[str, Pass]], max_length: int, step: Step
) -> GraphRecord:
    with step(f"Tracing the {name} ({model.shape.architecture}, {model.shape.num_layers} layers)"):
        graph = trace_decoder(load_weights(model.folder, model.config), max_length)
        return _save_graph(root, name, graph, passes)


def _save_graph(root: Path, name: str, graph: ir.Model, passes: Sequence[tuple[str, Pass]]) -> GraphRecord:
    counts = apply_passes(graph, passes)
    num_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise C2CError(
            f"{root.parent}: the disk is full: the {name} graph needs {num_bytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; nothing was left behind"
        )
    relative = f"graphs/{name}.onnx"
    ir.save(graph, root / relative, external_data=f"{name}.onnx.data")
    return GraphRecord(
        path=relative,
        inputs=tuple(_spec(value) for value in graph.graph.inputs),
        outputs=tuple(_spec(value) for value in graph.graph.outputs),
        num_nodes=len(graph.graph),
        num_bytes=num_bytes,
        passes=counts,
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _move_into_place(partial: Path, options: PairOptions) -> None:
    if not options.output.exists():
        partial.rename(options.output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{options.output.name}.replaced-", dir=options.output.parent))
    options.output.rename(replaced / "bundle")
    try:
        partial.rename(options.output)
    except BaseException:  # an interrupt too must not cost the old bundle
        (replaced / "bundle").rename(options.output)
        raise
    finally:
        shutil.rmtree(replaced)
