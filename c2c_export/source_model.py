"""A language model to export, resolved and checked, its weights not yet loaded.

In: a source (folder, hub id, `.gguf`) and where its chat template may come from. Out: a `SourceModel`, which holds all
that is cheap to read: configuration, shape, tokenizer, chat template, stop ids, and the record for the manifest.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from c2c_export.bundle import ModelRecord
from c2c_export.models import ModelShape, check_weight_files, model_record, read_config, read_stop_ids, shape_of
from c2c_export.sources import resolve_model
from c2c_export.tokenizer_source import choose_chat_template, load_tokenizer


@dataclass(frozen=True)
class SourceModel:
    """See the module's docstring; `folder` is in Hugging Face's layout, whatever `source` was."""

    source: str
    folder: Path
    config: Any
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    stop_ids: tuple[int, ...]
    record: ModelRecord


def read_source_model(source: str, template: Path | None, trained_with: Path | None) -> SourceModel:
    """Resolve and check the model that `source` names; everything but its weights, which are only looked through.

    `template` is a chat template file that the user gave, `trained_with` one that the fuser may have come with. Raises
    `UsageError` and `C2CError` as the functions do that it calls.
    """
    folder = resolve_model(source)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    chat_template, origin = choose_chat_template(
        tokenizer, source, template, trained_with if trained_with and trained_with.is_file() else None
    )
    check_weight_files(folder)
    shape = shape_of(config)
    return SourceModel(
        source=source,
        folder=folder,
        config=config,
        shape=shape,
        tokenizer=tokenizer,
        chat_template=chat_template,
        stop_ids=read_stop_ids(folder, config, tokenizer.eos_token_id),
        record=model_record(source, folder, shape, origin),
    )
