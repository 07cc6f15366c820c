"""Fixtures for tests of checks: recorded pairs with engines in several precisions."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checked_pairs import CheckedPair, FindPair, make_checked_pair


@pytest.fixture(scope="session")
def checked_pair(recorded_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> FindPair:
    """A recorded pair by name, its engines built once per worker."""
    made: dict[str, CheckedPair] = {}

    def find_or_make(name: str) -> CheckedPair:
        if name not in made:
            folder = tmp_path_factory.mktemp("checked")
            made[name] = make_checked_pair(name, recorded_bundle(name), folder)
        return made[name]

    return find_or_make
