"""Run one graph of an engine and its trained side over all feeds, and compare what they give, feed by feed.

In: a `GraphCase` and the engine that runs the graph. Out: one `Compared` per feed, as it is computed; Polygraphy's
`Comparator` runs and compares. With a folder, the results of both sides are saved there, one file per feed, for
`polygraphy inspect data`.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from c2c_export.check.comparing import LOGITS, CompareRows, RowsResult, Tolerances
from c2c_export.check.feeds.feed import GraphFeed
from c2c_export.check.graph_cases import GraphCase
from c2c_export.check.runner import EngineRunner, TrainedRunner
from c2c_export.errors import C2CError
from engines.base import Engine

TRAINED, ENGINE = "trained", "engine"
"""Names of the two sides in the saved results."""


@dataclass(frozen=True, eq=False)
class Compared:
    """One feed on both sides."""

    feed: GraphFeed
    expected: Mapping[str, NDArray[Any]]
    """Of the trained modules."""
    found: Mapping[str, NDArray[Any]]
    """Of the engine."""
    results: Mapping[str, RowsResult]
    """By output, in the order in which they are computed."""

    @property
    def first_failed(self) -> str | None:
        """The first output that left its tolerance, if any did."""
        return next((name for name, result in self.results.items() if not result), None)


def compare_graph(
    case: GraphCase, engine: Engine, tolerances: Tolerances, save_to: Path | None = None
) -> Iterator[Compared]:
    """Compare every feed of `case`. The engine must have no inputs that feeds lack.

    Raises `C2CError` where the engine cannot run, or the results cannot be saved.
    """
    for_runners, for_us = itertools.tee(case.feeds())
    runners = [TrainedRunner(case.trained, case.inputs, TRAINED), EngineRunner(lambda: engine, ENGINE)]
    dtypes = {spec.name: spec.dtype for spec in engine.outputs}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        loader = (feed.inputs for feed in for_runners)
        with contextlib.closing(Comparator.run(runners, data_loader=loader, streaming=True)) as stream:
            for number, feed in enumerate(for_us):
                results = next(stream)
                compare = CompareRows(feed, dtypes, tolerances, corrections=case.is_fuser)
                (accuracy,) = Comparator.compare_accuracy(results, compare_func=compare)
                compared = accuracy[TRAINED, ENGINE][0]
                yield Compared(feed, _outputs(results, TRAINED), _outputs(results, ENGINE), compared)
                if save_to is not None:
                    _save(results, feed, save_to / f"{number:04}.json")


def _outputs(results: RunResults, side: str) -> dict[str, NDArray[Any]]:
    (iteration,) = results[side]
    return dict(iteration.items())


def _save(results: RunResults, feed: GraphFeed, path: Path) -> None:
    """Both sides' outputs, of caches the rows in use."""

    def rows_in_use(iteration: IterationResult) -> IterationResult:
        cut = {name: array if name == LOGITS else array[:, :, : feed.num_rows] for name, array in iteration.items()}
        return IterationResult(cut, iteration.runtime, iteration.runner_name)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Comparator.postprocess(results, rows_in_use).save(str(path))
    except OSError as error:
        raise C2CError(f"{path}: cannot be written: {error.strerror}") from error
