"""The trained models of a bundle, loaded from their sources: what a check compares an engine with.

In: the manifest and the options of a check. Out: a `TrainedPair` in float32, weights loaded once. Sources are those of
the options, else those that the manifest names. Not covered: whether they are the ones the bundle was exported from,
which the level `sources` tells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from c2c_export.bundle import Manifest, ModelRecord
from c2c_export.check.exported.tokens import NewTokens, make_tokens
from c2c_export.check.options import CheckOptions
from c2c_export.check.trained.answer import TrainedAnswers
from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser
from c2c_export.checkpoint import FuserCheckpoint, check_fuser_fits, read_fuser
from c2c_export.errors import C2CError, UsageError, reason_of
from c2c_export.models import load_weights
from c2c_export.source_model import SourceModel, read_source_model
from c2c_export.sources import resolve_fuser

_FROM_FILE = "file "
"""What the manifest's `chat_template` begins with where a file gave it."""
_Read = TypeVar("_Read")


@dataclass(frozen=True, eq=False)
class TrainedPair:
    """A receiver with its sharers and their fusers, by number; `sharers` and `fusers` are empty for a single model."""

    receiver: TrainedDecoder
    sharers: Sequence[TrainedDecoder]
    fusers: Sequence[TrainedFuser]
    receiver_source: SourceModel
    sharer_sources: Sequence[SourceModel]

    @cached_property
    def answers(self) -> TrainedAnswers:
        """What the pair answers, each prompt computed once: every engine of a bundle is compared with the same."""
        return TrainedAnswers(self.receiver, self.sharers, self.fusers)

    @cached_property
    def tokens(self) -> NewTokens:
        """Tokenizers and alignment tables made anew. Raises `C2CError` for a tokenizer that a bundle cannot hold."""
        checkpoints = [fuser.checkpoint for fuser in self.fusers]
        strategies = [checkpoint.alignment_strategy if checkpoint.aligned else None for checkpoint in checkpoints]
        return make_tokens(self.receiver_source, self.sharer_sources, strategies)

    @classmethod
    def load(cls, manifest: Manifest, options: CheckOptions) -> "TrainedPair":
        """Load all of them.

        Raises `UsageError` when the options name more or fewer sharers or fusers than the bundle has, `C2CError` when a
        source is missing, naming the manifest's field and the option, or broken, or when a fuser does not fit.
        """
        _check_counts(manifest, options)
        checkpoints = [_read_checkpoint(manifest, options, number) for number in range(len(manifest.sharers))]
        receiver = _read_receiver(manifest, options, checkpoints)
        sharers = [_read_sharer(manifest, options, number, checkpoints[number]) for number in range(len(checkpoints))]
        for sharer, checkpoint in zip(sharers, checkpoints, strict=True):
            check_fuser_fits(
                checkpoint,
                receiver_layers=receiver.shape.num_layers,
                receiver_num_key_value_heads=receiver.shape.num_key_value_heads,
                receiver_head_dim=receiver.shape.head_dim,
                sharer_layers=sharer.shape.num_layers,
                sharer_num_key_value_heads=sharer.shape.num_key_value_heads,
                sharer_head_dim=sharer.shape.head_dim,
            )
        return cls(
            receiver=_load(receiver),
            sharers=[_load(sharer) for sharer in sharers],
            fusers=[TrainedFuser(checkpoint) for checkpoint in checkpoints],
            receiver_source=receiver,
            sharer_sources=sharers,
        )


def _check_counts(manifest: Manifest, options: CheckOptions) -> None:
    count = len(manifest.sharers)
    for option, given, expected in (
        ("--sharer", options.sharers, count),
        ("--fuser", options.fusers, count),
        ("--sharer-chat-template", options.sharer_chat_templates, count if manifest.aligned else 0),
    ):
        if given and len(given) != expected:
            why = "" if expected == count else ", which read the receiver's tokens"
            raise UsageError(
                f"{len(given)} {option} given, expected {expected or 'none'}: the bundle has {count} sharer(s){why}"
            )


def _load(source: SourceModel) -> TrainedDecoder:
    return TrainedDecoder(load_weights(source.folder, source.config))


def _read_checkpoint(manifest: Manifest, options: CheckOptions, number: int) -> FuserCheckpoint:
    given = options.fusers[number] if options.fusers else None
    return _from_source(
        given,
        manifest.sharers[number].fuser_source,
        f"sharers.{number}.fuser_source",
        "--fuser",
        lambda source: read_fuser(resolve_fuser(source)),
    )


def _read_receiver(manifest: Manifest, options: CheckOptions, checkpoints: Sequence[FuserCheckpoint]) -> SourceModel:
    trained_with = checkpoints[0].folder / "receiver_chat_template.jinja" if checkpoints else None
    template = options.receiver_chat_template or _template_of(
        manifest.receiver, "receiver", "--receiver-chat-template", trained_with
    )
    return _from_source(
        options.receiver,
        manifest.receiver.source,
        "receiver.source",
        "--receiver",
        lambda source: read_source_model(source, template, trained_with),
    )


def _read_sharer(manifest: Manifest, options: CheckOptions, number: int, checkpoint: FuserCheckpoint) -> SourceModel:
    record, field = manifest.sharers[number].model, f"sharers.{number}.model"
    trained_with = checkpoint.folder / "sharer_chat_template.jinja"
    if options.sharer_chat_templates:
        template: Path | None = options.sharer_chat_templates[number]
    else:
        template = _template_of(record, field, "--sharer-chat-template", trained_with)
    return _from_source(
        options.sharers[number] if options.sharers else None,
        record.source,
        f"{field}.source",
        "--sharer",
        lambda source: read_source_model(source, template, trained_with),
    )


def _from_source(given: str | None, recorded: str, field: str, option: str, read: Callable[[str], _Read]) -> _Read:
    """What `read` makes of the source that was given, else of the recorded one."""
    if given is not None:
        return read(given)
    try:
        return read(recorded)
    except C2CError as error:
        raise C2CError(
            f"manifest.json: field {field} names {recorded}, which cannot be read: {reason_of(error)}\n"
            f"Give what the bundle was exported from with {option}"
        ) from error


def _template_of(record: ModelRecord, field: str, option: str, trained_with: Path | None) -> Path | None:
    """The file that gave the chat template, where the user named one at export; None where the model or fuser had it.

    Raises `C2CError` where that file is gone.
    """
    if not record.chat_template.startswith(_FROM_FILE):
        return None
    file = Path(record.chat_template.removeprefix(_FROM_FILE))
    if trained_with is not None and trained_with.is_file() and file.name == trained_with.name:
        return None
    if not file.is_file():
        raise C2CError(
            f"manifest.json: field {field}.chat_template names the file {file}, which is not there; "
            f"give it with {option}"
        )
    return file
