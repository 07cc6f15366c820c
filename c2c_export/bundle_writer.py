"""Fill a bundle's folder: tokenizers and alignment tables, traced graphs, and last the manifest with every file's hash.

Each model is loaded, traced, passed through `c2c_export.passes`, saved and freed before the next; a fuser follows its
sharer. That a decoder can be lowered for the CPU is tried at once, not after the others took minutes to trace. Not
covered: where the folder lies and how it gets into place, see `c2c_export.staging`.
"""

import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from c2c_export import __version__
from c2c_export.alignment import compile_alignment
from c2c_export.bundle import (
    GRAPHS,
    SCHEMA_VERSION,
    Bundle,
    FusionMode,
    GraphRecord,
    LayerLink,
    Manifest,
    SharerRecord,
    TensorSpec,
    hash_folder,
    write_manifest,
)
from c2c_export.checkpoint import FuserCheckpoint
from c2c_export.errors import C2CError
from c2c_export.models import load_weights
from c2c_export.passes import FUSER_PASSES, RECEIVER_PASSES, Pass, apply_passes, sharer_passes
from c2c_export.polygraphy_folder import write_polygraphy_folder
from c2c_export.progress import Step
from c2c_export.source_model import SourceModel
from c2c_export.tokenizer import BundledTokenizer
from c2c_export.tokenizer_source import write_tokenizer
from c2c_export.trace.decoder import trace_decoder
from c2c_export.trace.fuser import CacheShape, trace_fuser
from engines.lowering import lower

EMBEDDED_ENGINE = ("ort-cpu", "fp32")
"""Target and precision of the engine that every bundle has."""
_VERSIONED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tokenizers")


@dataclass(frozen=True, eq=False)
class SourceSharer:
    """A sharer and its fuser."""

    model: SourceModel
    fuser: FuserCheckpoint
    fuser_source: str


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """What a bundle is to hold; everything in it was checked."""

    receiver: SourceModel
    sharers: Sequence[SourceSharer]
    max_length: int
    aligned: bool
    fusion_mode: FusionMode

    @property
    def separate_unfused(self) -> bool:
        """Whether fusers read the receiver's unfused rows apart from the cache, see `c2c_export.trace.fuser`."""
        return self.fusion_mode == "parallel" and len(self.sharers) > 1


def write_bundle(root: Path, plan: ExportPlan, step: Step) -> Bundle:
    """Write all files of the bundle into the empty folder `root`; return it, still without an engine.

    Raises `C2CError` when weights are broken, a graph cannot be lowered or the disk is too small, `OSError` when
    writing fails.
    """
    for name in (GRAPHS, "alignment", "tokenizers"):
        (root / name).mkdir()
    _write_tokenizers(root, plan, step)
    receiver_graph = _export_decoder(root, "receiver", plan.receiver, RECEIVER_PASSES, plan.max_length, step)
    records = [_export_sharer(root, number, plan, step) for number in range(len(plan.sharers))]
    with step("Hashing the bundle"):
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            tool_versions={"c2c-export": __version__, **{n: importlib.metadata.version(n) for n in _VERSIONED}},
            max_length=plan.max_length,
            aligned=plan.aligned,
            fusion_mode=plan.fusion_mode,
            stop_ids=plan.receiver.stop_ids,
            receiver=plan.receiver.record,
            receiver_graph=receiver_graph,
            sharers=tuple(records),
            engines={},
            files={},
        )
        write_polygraphy_folder(root, manifest)
        manifest = manifest.model_copy(update={"files": hash_folder(root)})
        write_manifest(root, manifest)
    return Bundle(root, manifest)


def _write_tokenizers(root: Path, plan: ExportPlan, step: Step) -> None:
    receiver = _write_tokenizer(plan.receiver, root / "tokenizers" / "receiver")
    if not plan.aligned:
        return
    vocab = max(plan.receiver.shape.vocab_size, receiver.vocab_size)
    for number, sharer in enumerate(plan.sharers):
        with step(f"Compiling the token alignment for sharer {number}"):
            tokenizer = _write_tokenizer(sharer.model, root / "tokenizers" / f"sharer{number}")
            strategy = sharer.fuser.alignment_strategy
            table = compile_alignment(receiver, tokenizer, receiver_vocab=vocab, strategy=strategy)
            highest, embedded = int(table.max()), sharer.model.shape.vocab_size
            if highest >= embedded:
                raise C2CError(
                    f"{sharer.model.source}: its tokenizer gives id {highest}, the model embeds ids below {embedded}; "
                    "give the tokenizer that the model was trained with"
                )
            np.save(root / "alignment" / f"sharer{number}.npy", table)


def _write_tokenizer(model: SourceModel, folder: Path) -> BundledTokenizer:
    write_tokenizer(model.tokenizer, model.chat_template, folder)
    return BundledTokenizer.load(folder)


def _export_sharer(root: Path, number: int, plan: ExportPlan, step: Step) -> SharerRecord:
    model, fuser = plan.sharers[number].model, plan.sharers[number].fuser
    links = _links(fuser)
    read = frozenset((link.sharer_layer, "key") for link in links if link.key_gate_open)
    read |= frozenset((link.sharer_layer, "value") for link in links if link.value_gate_open)
    sharer_graph = fuser_graph = None
    if read:
        sharer_graph = _export_decoder(root, f"sharer{number}", model, sharer_passes(read), plan.max_length, step)
        with step(f"Tracing fuser {number} ({len(links)} projectors)"):
            graph = trace_fuser(
                fuser,
                _cache_shape(model),
                _cache_shape(plan.receiver),
                plan.max_length,
                separate_unfused=plan.separate_unfused,
            )
            fuser_graph = _save_graph(root, f"fuser{number}", graph, FUSER_PASSES)
    return SharerRecord(
        model=model.record,
        fuser_source=plan.sharers[number].fuser_source,
        fuser_sources=fuser.files,
        alignment_strategy=fuser.alignment_strategy if plan.aligned else None,
        links=links,
        sharer_graph=sharer_graph,
        fuser_graph=fuser_graph,
    )


def _links(fuser: FuserCheckpoint) -> tuple[LayerLink, ...]:
    return tuple(
        LayerLink(
            receiver_layer=link.receiver_layer,
            sharer_layer=link.sharer_layer,
            projector=link.projector,
            key_gate_open=fuser.projectors[link.projector].key_gate_open,
            value_gate_open=fuser.projectors[link.projector].value_gate_open,
        )
        for link in fuser.links
    )


def _cache_shape(model: SourceModel) -> CacheShape:
    return CacheShape(model.shape.num_key_value_heads, model.shape.head_dim)


def _export_decoder(
    root: Path, name: str, model: SourceModel, passes: Sequence[tuple[str, Pass]], max_length: int, step: Step
) -> GraphRecord:
    with step(f"Tracing the {name} ({model.shape.architecture}, {model.shape.num_layers} layers)"):
        graph = trace_decoder(load_weights(model.folder, model.config), max_length)
        record = _save_graph(root, name, graph, passes)
        del graph
        _check_lowers(root / record.path, model)
        return record


def _check_lowers(path: Path, model: SourceModel) -> None:
    """Raise `C2CError` naming the model where the graph at `path` has what the CPU's engine does not cover."""
    try:
        lower(path, *EMBEDDED_ENGINE, is_fuser=False)
    except C2CError as error:
        raise C2CError(f"{model.source}: {error}") from error


def _save_graph(root: Path, name: str, graph: ir.Model, passes: Sequence[tuple[str, Pass]]) -> GraphRecord:
    counts = apply_passes(graph, passes)
    num_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise C2CError(
            f"{root.parent}: the disk is full: the {name} graph needs {num_bytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; nothing was left behind"
        )
    relative = f"{GRAPHS}/{name}.onnx"
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
