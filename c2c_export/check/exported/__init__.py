"""What a bundle keeps beside its graphs, against what it was exported from, made anew.

models.py       the source files' hashes, and the manifest's fields of each model
links.py        layer map, gates, alignment flags and fusion mode
tokenizers.py   tokenizers, special tokens and chat templates
alignment.py    alignment tables
"""
