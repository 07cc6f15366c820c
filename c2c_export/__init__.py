"""c2c-export: a deployment compiler for Cache-to-Cache (C2C, arXiv 2510.03215).

Importing this package loads neither torch nor transformers; only the exporting modules (`models`, `trace`, `pair`) do.
"""

__version__ = "0.1.0"
