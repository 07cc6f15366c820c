"""`c2c-export bench`: how fast a bundle is on this machine, and beside what.

In: a bundle and `BenchOptions`. Out: a `BenchReport`, as JSON, as tables, as a plot. Like `c2c_export.cli`, whose
command it is, this package may import `runtime`; nothing else of `c2c_export` may import it.
"""
