"""`c2c-export pair`: a receiver, its sharers and their fusers in, a bundle out. Without sharers it is one model's.

What can be checked without tracing is checked first: options, configurations, tokenizers, templates, the fusers whole,
the models' weight files. Then `c2c_export.bundle_writer` fills the bundle, beside its final place, and
`c2c_export.build` adds the engine for the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from c2c_export.build import add_engine
from c2c_export.build_plan import BuildOptions
from c2c_export.bundle import FusionMode
from c2c_export.bundle_writer import EMBEDDED_ENGINE, ExportPlan, SourceSharer, write_bundle
from c2c_export.checkpoint import check_fuser_fits, read_fuser
from c2c_export.errors import C2CError, UsageError
from c2c_export.progress import Step
from c2c_export.quiet import quiet_libraries
from c2c_export.source_model import SourceModel, read_source_model
from c2c_export.sources import resolve_fuser
from c2c_export.staging import check_output, staged_bundle
from engines.targets import target_of, warn_of_slow_attention

_MIN_LENGTH = 16
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class PairOptions:
    """What to export. `sharers`, `fusers` and, if given, `sharer_chat_templates` go together by position.

    Without any of them the bundle is that of one model, the receiver.
    """

    receiver: str
    sharers: Sequence[str]
    fusers: Sequence[str]
    output: Path
    max_length: int | None = None
    """Capacity of the caches in tokens; None takes 2048, or what the model with the fewest positions has."""
    fusion_mode: FusionMode | None = None
    """None takes what the first fuser's configuration names, else "parallel"."""
    receiver_chat_template: Path | None = None
    sharer_chat_templates: Sequence[Path] = field(default=())
    overwrite: bool = False


def export_pair(options: PairOptions, step: Step) -> Path:
    """Export the pair and return the bundle's folder.

    Raises `UsageError` for wrong options and `C2CError` for anything that the models, the fusers or the machine lack.
    Issues a `SlowAttentionWarning` for a model that the CPU's engine is slow with.
    """
    _check_options(options)
    with quiet_libraries():
        with step("Reading models and fusers"):
            plan = _plan(options)
        with staged_bundle(options.output, overwrite=options.overwrite) as folder:
            bundle = write_bundle(folder, plan, step)
            add_engine(bundle, BuildOptions(folder, *EMBEDDED_ENGINE), step)
    models = [plan.receiver, *(sharer.model for sharer in plan.sharers)]
    warn_of_slow_attention(EMBEDDED_ENGINE[0], [(model.source, model.shape.head_dim) for model in models])
    return options.output


def _check_options(options: PairOptions) -> None:
    if len(options.sharers) != len(options.fusers):
        raise UsageError(
            f"{len(options.sharers)} sharer(s) and {len(options.fusers)} fuser(s) given; "
            "expected one --fuser per --sharer"
        )
    if options.sharer_chat_templates and len(options.sharer_chat_templates) != len(options.sharers):
        raise UsageError(
            f"{len(options.sharer_chat_templates)} --sharer-chat-template given for {len(options.sharers)} sharers; "
            "expected none or one for each"
        )
    if options.max_length is not None and options.max_length < _MIN_LENGTH:
        raise UsageError(f"--max-length {options.max_length}: expected at least {_MIN_LENGTH}")
    if options.fusion_mode is not None and not options.sharers:
        raise UsageError(f"--fusion-mode {options.fusion_mode}: there is no --sharer, so nothing is fused")
    if options.fusion_mode not in (None, "parallel", "sequential"):
        raise UsageError(f"--fusion-mode {options.fusion_mode}: expected parallel or sequential")
    check_output(options.output, overwrite=options.overwrite)


def _plan(options: PairOptions) -> ExportPlan:
    fusers = [read_fuser(resolve_fuser(source)) for source in options.fusers]
    aligned, mode = (fusers[0].aligned, fusers[0].fusion_mode) if fusers else (False, None)
    trained_with = fusers[0].folder / "receiver_chat_template.jinja" if fusers else None
    receiver = read_source_model(options.receiver, options.receiver_chat_template, trained_with)
    templates: Sequence[Path | None] = options.sharer_chat_templates or [None] * len(fusers)
    sharers = [
        SourceSharer(
            read_source_model(source, template, fuser.folder / "sharer_chat_template.jinja"), fuser, fuser_source
        )
        for source, template, fuser, fuser_source in zip(
            options.sharers, templates, fusers, options.fusers, strict=True
        )
    ]
    for sharer in sharers:
        _check_fits(receiver, sharer, aligned=aligned)
    if options.sharer_chat_templates and not aligned:
        raise UsageError(
            "--sharer-chat-template: this pair is unaligned, so the sharer reads the receiver's tokens and has no "
            "template of its own; give --receiver-chat-template"
        )
    models = [receiver, *(sharer.model for sharer in sharers)]
    max_length = _choose_length(options.max_length, models)
    _check_engine(models, max_length)
    return ExportPlan(
        receiver=receiver,
        sharers=sharers,
        max_length=max_length,
        aligned=aligned,
        fusion_mode=options.fusion_mode or mode or "parallel",
    )


def _check_fits(receiver: SourceModel, sharer: SourceSharer, *, aligned: bool) -> None:
    fuser = sharer.fuser
    check_fuser_fits(
        fuser,
        receiver_layers=receiver.shape.num_layers,
        receiver_num_key_value_heads=receiver.shape.num_key_value_heads,
        receiver_head_dim=receiver.shape.head_dim,
        sharer_layers=sharer.model.shape.num_layers,
        sharer_num_key_value_heads=sharer.model.shape.num_key_value_heads,
        sharer_head_dim=sharer.model.shape.head_dim,
    )
    if fuser.aligned != aligned:
        raise C2CError(
            f"{fuser.folder / 'config.json'}: is_do_alignment is {fuser.aligned}, but the first fuser's is {aligned}; "
            "the fusers of one bundle must agree"
        )
    if aligned and receiver.tokenizer.pad_token is None and receiver.tokenizer.eos_token is None:
        raise C2CError(
            f"{receiver.source}: its tokenizer has neither a padding nor an end token, and {fuser.folder} was trained "
            "with alignment, which pads; name one of both in tokenizer_config.json"
        )
    if not aligned and sharer.model.shape.vocab_size < len(receiver.tokenizer):
        raise C2CError(
            f"{sharer.model.source}: its vocabulary of {sharer.model.shape.vocab_size} does not cover the receiver's "
            f"{len(receiver.tokenizer)} tokens, but {fuser.folder} was trained without alignment"
        )


def _check_engine(models: Sequence[SourceModel], max_length: int) -> None:
    """Refuse now what the engine that every bundle has would refuse after everything was traced."""
    name, precision = EMBEDDED_ENGINE
    for model in models:
        refusal = target_of(name).refusal(precision, head_sizes=[model.shape.head_dim], capacity=max_length)
        if refusal is not None:
            raise UsageError(f"{model.source}: {refusal}")


def _choose_length(asked: int | None, models: Sequence[SourceModel]) -> int:
    fewest = min(models, key=lambda model: model.shape.max_position_embeddings)
    limit = fewest.shape.max_position_embeddings
    if asked is None:
        return max(_MIN_LENGTH, min(_DEFAULT_LENGTH, limit))
    if asked > limit:
        raise UsageError(f"--max-length {asked}: {fewest.source} has positions for {limit} tokens only")
    return asked
