"""What a divergence looks like: guesses that are tried on the trained modules, and the one that fits, in a sentence.

    fits.py      what was compared, and whether a guess explains it
    decoder.py   swapped keys and values, rotations, masks of single slots
    fuser.py     closed gates, shifted layer maps, other tokens' rows

A guess that fits is no proof; where none fits, nothing is said.
"""
