"""Bundles in EleutherAI's lm-evaluation-harness, as its model `c2c`. Importing this package registers it.

    arguments.py      what `--model_args` may hold
    contexts.py       a request's context: raw text, or a chat that keeps its messages
    gen_kwargs.py     a request's generation options in the runtime's terms
    capacity.py       what does not fit the bundle's capacity
    model.py          the model: log-likelihoods and generations by `runtime`
    __main__.py       the harness's own command line with this model registered

In versions after 0.4.13 the harness finds `c2c` by itself, by the entry point `lm_eval.models` (setup.cfg). Before that
it knows the models of its own source tree only: `python -m c2c_export.lm_eval …` takes the place of `lm_eval …`, and
`import c2c_export.lm_eval` goes before `lm_eval.simple_evaluate("c2c", …)`. Needs the extra `lm-eval`. Not covered:
requests with images or audio, and several processes.
"""

import lm_eval.models  # noqa: F401 (registers the harness's own models, which it only does where no other came first)
from lm_eval.api.registry import model_registry

# By name, not by decorator, which clashes with an entry point in versions that expect none. Else it was found as one.
if "c2c" not in model_registry:
    model_registry.register("c2c", target="c2c_export.lm_eval.model:C2CLanguageModel")
