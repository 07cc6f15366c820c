"""A check's report as one HTML file that needs nothing else: no link, script, font or image from outside.

    write.py              fill the templates, write the file
    templates/            the page, one file per section, and its style
    numbers.py            numbers as a reader wants them, with the exact ones at hand
    visible_text.py       white space, control characters and directions that would otherwise go unseen
    parting.py            where two texts part
    verdict.py            why an engine failed, and what each level asks
    allowance.py          how much of its tolerance a measurement used
    log_colours.py        steps of colour for numbers that span decades
    svg.py                SVG elements, escaped
    cache_heatmap.py, gate_chart.py, tolerance_bar.py
                          one figure each

In: a `CheckReport` and nothing else. Out: `write_html`. Text of the report is never trusted: templates escape
everything, and figures are built as trees. Not covered: the terminal's tables, see `c2c_export.check.show`.
"""

from c2c_export.check.html.write import write_html

__all__ = ["write_html"]
