"""The source files of a model or fuser and the manifest's fields of it, against what they are now.

In: the manifest's record and the source as it was read for the check. Out: a `Divergence` for each file that is
missing or another, and each field that differs. A file that the manifest does not list is none: it was not exported.
"""

from collections.abc import Iterator, Mapping

from c2c_export.bundle import GraphRecord, Manifest, ModelRecord
from c2c_export.check_record import Divergence

_FIELDS = (
    "architecture",
    "num_layers",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
    "max_position_embeddings",
)


def check_files(graph: str, what: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterator[Divergence]:
    """Compare sha256 by file name; `what` says whose files they are, with the manifest's field."""
    for name, digest in recorded.items():
        if name not in found:
            message = f"{what}: {name} is not there; the bundle was exported from it (sha256 {digest[:12]}…)"
            yield Divergence(graph=graph, message=message)
        elif found[name] != digest:
            message = (
                f"{what}: {name} is another file: its sha256 is {found[name][:12]}…, the manifest has {digest[:12]}…"
            )
            yield Divergence(graph=graph, message=message)


def check_fields(graph: str, place: str, recorded: ModelRecord, found: ModelRecord) -> Iterator[Divergence]:
    """Compare what the manifest's `place` says of a model with its configuration."""
    for field in _FIELDS:
        in_manifest, in_model = getattr(recorded, field), getattr(found, field)
        if in_manifest != in_model:
            message = f"{place}.{field} is {in_manifest} in the manifest, the model's is {in_model}"
            yield Divergence(graph=graph, message=message)


def check_cache_shapes(manifest: Manifest) -> Iterator[Divergence]:
    """Compare the caches that the manifest's graphs take with its capacity and each model's heads and head size."""
    for name, graph in manifest.graphs.items():
        for spec in graph.inputs:
            model = _model_of(manifest, name, spec.name)
            if model is None or spec.name.startswith("unfused_"):
                continue
            expected = (model.num_key_value_heads, manifest.max_length, model.head_dim)
            if tuple(spec.shape[1:]) != expected:
                message = (
                    f"{spec.name} has heads, rows and head size {list(spec.shape[1:])}, expected {list(expected)} by "
                    "what the manifest says of the model and by its max_length"
                )
                yield Divergence(graph=name, message=message)


def check_graph_names(manifest: Manifest, has_open_gates: list[bool]) -> Iterator[Divergence]:
    """Compare which sharers have graphs with which fusers have open gates."""
    for number, (sharer, is_open) in enumerate(zip(manifest.sharers, has_open_gates, strict=True)):
        graphs: dict[str, GraphRecord | None] = {"sharer": sharer.sharer_graph, "fuser": sharer.fuser_graph}
        for name, graph in graphs.items():
            if (graph is not None) != is_open:
                found = "no" if graph is None else "a"
                message = f"the manifest has {found} {name} graph, but {'a' if is_open else 'no'} gate is open"
                yield Divergence(graph=f"{name}{number}", message=message)


def _model_of(manifest: Manifest, graph: str, cache: str) -> ModelRecord | None:
    """Whose cache an input is; None for an input that is no cache."""
    if not any(cache.startswith(prefix) for prefix in ("past_", "sharer_key", "sharer_value")):
        return None
    number = graph.removeprefix("sharer").removeprefix("fuser")
    is_receivers = graph == "receiver" or (graph.startswith("fuser") and cache.startswith("past_"))
    return manifest.receiver if is_receivers else manifest.sharers[int(number)].model
