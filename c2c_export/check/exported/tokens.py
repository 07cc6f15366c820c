"""A pair's tokenizers, chat templates and alignment tables, made anew from its sources: once for all of its engines.

In: the models as they were read for the check, and the alignment strategy of each sharer, None in an unaligned pair.
Out: `NewTokens`: the files that a bundle of them holds, and its tables.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from c2c_export.alignment import compile_alignment
from c2c_export.bundle import AlignmentStrategy
from c2c_export.source_model import SourceModel
from c2c_export.tokenizer import BundledTokenizer
from c2c_export.tokenizer_source import write_tokenizer


@dataclass(frozen=True, eq=False)
class NewTokens:
    """See the module's docstring. Tokenizers and files: the receiver's, then in an aligned pair each sharer's."""

    tokenizers: Sequence[BundledTokenizer]
    files: Sequence[Mapping[str, bytes]]
    """Contents by file name."""
    tables: Sequence[NDArray[np.int32]]
    """[receiver's vocabulary], one for each sharer of an aligned pair."""


def make_tokens(
    receiver: SourceModel, sharers: Sequence[SourceModel], strategies: Sequence[AlignmentStrategy | None]
) -> NewTokens:
    """Make them. Raises `C2CError` for a tokenizer that a bundle cannot hold."""
    is_aligned = bool(strategies) and None not in strategies
    tokenizers, files, tables = [], [], []
    for model in [receiver, *(sharers if is_aligned else ())]:
        with tempfile.TemporaryDirectory(prefix="c2c-export-") as folder:
            write_tokenizer(model.tokenizer, model.chat_template, Path(folder))
            tokenizers.append(BundledTokenizer.load(Path(folder)))
            files.append({path.name: path.read_bytes() for path in Path(folder).iterdir()})
    vocab = max(receiver.shape.vocab_size, tokenizers[0].vocab_size)
    for sharer, strategy in zip(tokenizers[1:], strategies, strict=False):
        assert strategy is not None
        tables.append(compile_alignment(tokenizers[0], sharer, receiver_vocab=vocab, strategy=strategy))
    return NewTokens(tokenizers, files, tables)
