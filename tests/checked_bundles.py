"""A recorded pair's bundle beside its trained models, as the levels of a check are given them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from recorded_cases import GOLDEN

from c2c_export.bundle import Bundle, read_manifest
from c2c_export.check.engine import CheckedEngine
from c2c_export.check.level import CheckContext
from c2c_export.check.options import CheckOptions
from c2c_export.check.prompts import CalibrationPrompt, ChatMessage
from c2c_export.check.trained.pair import TrainedPair

PROMPTS = tuple(
    CalibrationPrompt(messages=(ChatMessage(role="user", content=text),))
    for text in ("Which country is the city of Lyon in?", "Name three rivers, one a line.")
)


def options_of(bundle: Path, pair: str, **more: Any) -> CheckOptions:
    """The options that check `bundle` against the models of the recorded pair of that name."""
    folder = GOLDEN / pair
    sources = {
        "receiver": str(folder / "receiver"),
        "sharers": [str(path) for path in sorted(folder.glob("sharer*"))],
        "fusers": [str(path) for path in sorted(folder.glob("fuser*"))],
    }
    return CheckOptions(bundle=bundle, **{"num_threads": 1, **sources, **more})


@cache
def trained_pair(bundle: Path, pair: str) -> TrainedPair:
    """The trained models of a recorded pair, loaded once."""
    return TrainedPair.load(read_manifest(bundle), options_of(bundle, pair))


def context_of(
    bundle: Path,
    pair: str,
    engine: str = "ort-cpu-fp32",
    *,
    trained: TrainedPair | None = None,
    prompts: Sequence[CalibrationPrompt] = PROMPTS,
    **more: Any,
) -> CheckContext:
    """What a level is given of that engine, which is loaded anew; `more` are further options.

    `trained` is by default what the bundle at that path is compared with.
    """
    opened = Bundle.open(bundle)
    record = opened.manifest.engines[engine]
    return CheckContext(
        options=options_of(bundle, pair, new_tokens=12, **more),
        bundle=opened,
        name=engine,
        record=record,
        trained=trained or trained_pair(bundle, pair),
        engine=CheckedEngine(opened, record, num_threads=1),
        prompts=prompts,
    )
