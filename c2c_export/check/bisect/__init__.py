"""Name the node of a graph, and the module of the model, where an error first passes its tolerance.

recorded.py   what torch's modules read and give in one call, by forward hooks
points.py     the values of an ONNX graph that are a module's input or output
search.py     run the graph with those values marked as outputs, compare them in order, find the first that is off
"""
