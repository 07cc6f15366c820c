"""Level `sources`: the bundle was made of these models and fusers, and everything but its graphs is theirs.

In: the bundle, and what it was exported from, as it was read for the check. Out: a divergence for each source file that
is missing or another; each field, link, gate, flag and stop id of the manifest that differs from the checkpoint's and
models'; each tokenizer, chat template and alignment table that differs from one that is made anew.

Not covered: the graphs, see the level `weights`.
"""

from collections.abc import Iterator

from c2c_export.bundle import ModelRecord
from c2c_export.check.exported.alignment import check_alignment
from c2c_export.check.exported.links import check_flags, check_links
from c2c_export.check.exported.models import check_cache_shapes, check_fields, check_files, check_graph_names
from c2c_export.check.exported.tokenizers import check_tokenizer
from c2c_export.check.graph.fuser_wiring import open_gates
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.tolerances import measured
from c2c_export.check_record import Divergence
from c2c_export.source_model import SourceModel
from c2c_export.sources import is_model_file


def check_sources(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where a file of the bundle cannot be read."""
    found = [*other_files(context), *_check_models(context), *_check_fusers(context), *_check_tokens(context)]
    precision = context.record.precision
    num_files = sum(len(record) for record in _recorded_files(context))
    return LevelResult(
        measurements=[
            measured("sources", "source files", precision, num_files),
            measured("sources", "differences", precision, len(found)),
        ],
        divergences=found,
    )


def other_files(context: CheckContext) -> list[Divergence]:
    """A divergence for each source file that is missing or another than the bundle was exported from."""
    manifest, trained = context.bundle.manifest, context.trained
    found: list[Divergence] = []
    for graph, _, record, source in _models(context):
        # A bundle of an earlier version lists what else lay beside the model too.
        recorded = {name: digest for name, digest in record.sources.items() if is_model_file(name)}
        found += check_files(graph, f"{graph} {source.source}", recorded, source.record.sources)
    for number, (sharer, fuser) in enumerate(zip(manifest.sharers, trained.fusers, strict=True)):
        what, files = f"fuser{number} {fuser.checkpoint.folder}", fuser.checkpoint.files
        found += check_files(f"fuser{number}", what, sharer.fuser_sources, files)
    return found


def _models(context: CheckContext) -> Iterator[tuple[str, str, ModelRecord, SourceModel]]:
    """Of each model its graph, its place in the manifest, its record there, and its source."""
    manifest, trained = context.bundle.manifest, context.trained
    yield "receiver", "receiver", manifest.receiver, trained.receiver_source
    for number, (sharer, source) in enumerate(zip(manifest.sharers, trained.sharer_sources, strict=True)):
        yield f"sharer{number}", f"sharers.{number}.model", sharer.model, source


def _recorded_files(context: CheckContext) -> Iterator[dict[str, str]]:
    manifest = context.bundle.manifest
    yield manifest.receiver.sources
    for sharer in manifest.sharers:
        yield sharer.model.sources
        yield sharer.fuser_sources


def _check_models(context: CheckContext) -> Iterator[Divergence]:
    manifest, trained = context.bundle.manifest, context.trained
    for graph, place, record, source in _models(context):
        yield from check_fields(graph, place, record, source.record)
    if manifest.stop_ids != trained.receiver_source.stop_ids:
        message = (
            f"stop_ids are {list(manifest.stop_ids)} in the manifest, the model's are "
            f"{list(trained.receiver_source.stop_ids)}"
        )
        yield Divergence(graph="receiver", message=message)
    yield from check_cache_shapes(manifest)


def _check_fusers(context: CheckContext) -> Iterator[Divergence]:
    manifest, fusers = context.bundle.manifest, context.trained.fusers
    for number, (recorded, fuser) in enumerate(zip(manifest.sharers, fusers, strict=True)):
        checkpoint = fuser.checkpoint
        yield from check_links(number, recorded, checkpoint)
        yield from check_flags(number, manifest, checkpoint)
    yield from check_graph_names(manifest, [bool(open_gates(fuser.checkpoint)) for fuser in fusers])


def _check_tokens(context: CheckContext) -> Iterator[Divergence]:
    bundle, new = context.bundle, context.trained.tokens
    yield from check_tokenizer("receiver", bundle.tokenizer_folder(), new.files[0])
    # Where manifest and fusers disagree about alignment, which the flags tell, one side has no table.
    for number, table in enumerate(new.tables if bundle.manifest.aligned else ()):
        yield from check_tokenizer(f"sharer{number}", bundle.tokenizer_folder(number), new.files[number + 1])
        file = bundle.alignment_file(number)
        difference = check_alignment(file, table, new.tokenizers[0], new.tokenizers[number + 1])
        if difference is not None:
            yield difference
