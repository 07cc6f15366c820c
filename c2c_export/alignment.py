"""The token alignment of a pair, compiled into a table: receiver token id to sharer token id.

In: the tokenizers of both models. Out: an int32 array that holds, for every id of the receiver's vocabulary, the
sharer's id that stands for it in a fused message. The reference aligns token by token, whatever stands around a token,
so the table is exact. Not covered: whether the sharer's model has an embedding for every id in it (the caller checks
that). Nothing here imports torch or transformers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from c2c_export.bundle import AlignmentStrategy
from c2c_export.tokenizer import BundledTokenizer

# The encodings of a whole vocabulary at once would take a gigabyte.
_CHUNK_SIZE = 8192


def compile_alignment(
    receiver: BundledTokenizer, sharer: BundledTokenizer, *, receiver_vocab: int, strategy: AlignmentStrategy
) -> npt.NDArray[np.int32]:
    """The sharer's token id for every receiver token id: int32 [receiver_vocab].

    A special token goes to its counterpart. Any other is decoded on its own, and the sharer's encoding of that text
    gives the id: its first token, or the one with the longest text (the earlier of equals). An empty encoding, that of
    ids beyond the receiver's tokenizer included, gives the sharer's unknown token, or 0 where it has none.
    """
    texts = receiver.backend.decode_batch([[i] for i in range(receiver_vocab)], skip_special_tokens=False)
    unknown = sharer.special.unknown_id or 0
    table = np.full(receiver_vocab, unknown, dtype=np.int32)
    lengths = _text_lengths(sharer) if strategy == "longest" else None
    for token, ids in enumerate(_encode_each(sharer, texts)):
        if ids:
            # max() takes the first of equals, as the reference does
            table[token] = ids[0] if lengths is None else max(ids, key=lengths.__getitem__)
    for token in receiver.special.special_ids:
        if token < receiver_vocab:
            table[token] = _special_counterpart(token, texts[token], receiver, sharer)
    return table


def _special_counterpart(token: int, text: str, receiver: BundledTokenizer, sharer: BundledTokenizer) -> int:
    ours, theirs = receiver.special, sharer.special
    # One id may have several roles (padding is often the end token); the last one in this order decides.
    counterparts = {
        ours.padding_id: theirs.padding_id,
        ours.end_id: theirs.end_id,
        ours.begin_id: theirs.begin_id,
        ours.unknown_id: theirs.unknown_id,
    }
    counterpart = counterparts.get(token)
    if counterpart is None:
        counterpart = sharer.backend.token_to_id(text)
    if counterpart is None:
        counterpart = theirs.unknown_id
    return counterpart or 0


def _text_lengths(tokenizer: BundledTokenizer) -> list[int]:
    texts = tokenizer.backend.decode_batch([[i] for i in range(_highest_id(tokenizer) + 1)], skip_special_tokens=False)
    return [len(text) for text in texts]


def _highest_id(tokenizer: BundledTokenizer) -> int:
    # Not vocab_size - 1: a vocabulary may have gaps.
    return max(tokenizer.backend.get_vocab(with_added_tokens=True).values())


def _encode_each(tokenizer: BundledTokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _CHUNK_SIZE):
        chunk = list(texts[start : start + _CHUNK_SIZE])
        for encoding in tokenizer.backend.encode_batch_fast(chunk, add_special_tokens=False):
            yield encoding.ids
