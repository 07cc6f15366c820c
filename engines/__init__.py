"""Engines: what runs a graph on a machine. `base` is the interface, each backend has a folder of its own."""
