"""Read an engine's ONNX graph: which trained parameter each of its constants is, and what it is worth.

stored.py      a constant operand as it is stored: floating point, or integers in blocks, and what these stand for
weights.py     every weight of a decoder's or fuser's graph under the name that it has in torch
modules.py     which module of the model a node was traced from
"""
