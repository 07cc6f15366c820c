"""The trained models in torch, which every level of the check takes for the truth.

    decoder.py      one language model over given caches, by transformers' own modules
    projector.py    one projector, written from the paper's formulas
    fuser.py        all projectors of one sharer over given caches
    pair.py         a receiver with its sharers and fusers, loaded from their sources
    answer.py       Cache-to-Cache as a whole: prefill, fusion, greedy decoding

Nothing here shares code with `c2c_export.trace`, which is among what is checked.
"""
