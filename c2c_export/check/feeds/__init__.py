"""What the graphs are fed: real prompts and random caches, the same for the engine and for the trained modules.

    feed.py      one call of a graph, and which rows of which slots it writes
    caches.py    random caches of the size of real ones, and tokens of the calibration prompts
    decoder.py   calls of a receiver or a sharer: prompts, later chunks, closing padding, steps of several slots
    fuser.py     calls of a fuser: sections of prompts, single rows, rows behind others

A feed holds more inputs than either side reads: every layer's caches, whatever the graph was pruned to.
"""
