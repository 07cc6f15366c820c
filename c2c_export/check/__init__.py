"""`c2c-export check`: prove that an engine computes what the trained models compute, level by level.

    options.py      what to check, with which sources, prompts and levels
    json_lines.py   read a JSON Lines file of prompts or questions
    prompts.py      calibration prompts: a file's, or those that come with the package
    trained/        the trained models in torch: decoders over given caches, fusers, and C2C as a whole
    fitting.py      which prompts and questions a bundle can be asked at all
    engine.py       the engine that is checked, graph by graph and as a whole
    selection.py    which engines a check is about, and what the manifest keeps of it
    both_sides.py   a prompt on both sides; prompt_details.py describes it for the report
    held_pair.py    the trained pair with an engine's own rounded weights, for the levels of the whole engine
    levels/         one file per level, in the order of `c2c_export.check_record.LEVELS`
    runner.py       Polygraphy's runners of both sides
    feeds/          what the graphs are fed: prompts, random caches, steps of several slots
    graph_cases.py  each graph beside its trained modules (held_weights.py) and its feeds
    compare_graph.py, comparing.py, changed_graph.py
                    run both sides by Polygraphy's `Comparator` and compare row by row
    diagnosis/      what a divergence looks like, by guesses tried on the trained modules
    tolerances.py   how far each level may be off in each precision, and why
    report.py       the whole result as records: what JSON, HTML and terminal show
    run.py          run the levels, write the manifest
    bisect/         name the node and the module where an error first passes its tolerance
    html/           the report as one file without outside links
    show.py         the report in the terminal

Needs torch, transformers and polygraphy (the extra `check`). Not covered: how fast an engine is, see
`c2c_export.bench`.
"""
