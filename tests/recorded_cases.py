"""The recorded cases of the reference implementation, for tests that go through all of them; see golden/README.md."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
CACHE_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-3

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recorded:
    """One recorded case: the prompt that the reference was given and everything that it did."""

    folder: str
    index: int
    aligned: bool
    num_sharers: int
    messages: list[dict[str, str]] | None
    sections: list[list[int]]

    def array(self, name: str) -> Array:
        return _arrays(self.folder)[f"{self.index}.{name}"][0]

    def real(self, model: str) -> Array:
        """bool [n]: which positions of the padded prompt hold a token of the model."""
        if self.aligned:
            return ~self.array(f"{model}_padding_mask")
        return np.ones(len(self.array("receiver_ids")), dtype=bool)

    @property
    def prompt(self) -> list[dict[str, str]] | list[int]:
        return self.messages or self.array("receiver_ids").tolist()

    @property
    def prompt_argument(self) -> dict[str, Any]:
        return {"messages": self.prompt} if self.aligned else {"input_ids": self.prompt}


@cache
def _arrays(folder: str) -> dict[str, Array]:
    return load_file(GOLDEN / folder / "expected.safetensors")


def _read(folder: Path) -> list[Recorded]:
    content = json.loads((folder / "case.json").read_text())
    return [
        Recorded(folder.name, index, content["aligned"], content["num_sharers"], case.get("messages"), case["sections"])
        for index, case in enumerate(content["cases"])
    ]


RECORDED = [case for folder in sorted(GOLDEN.iterdir()) if folder.is_dir() for case in _read(folder)]


def case_params(cases: list[Recorded]) -> list[Any]:
    marks = pytest.mark.xdist_group
    return [pytest.param(case, id=f"{case.folder}-{case.index}", marks=marks(case.folder)) for case in cases]


every_case = pytest.mark.parametrize("case", case_params(RECORDED))
