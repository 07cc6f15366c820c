"""Caches to begin a call from: random ones, as large as real ones, and a prompt's own where rows are real.

Everything is drawn with a fixed seed, so that a check that is run again gives the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Caches = dict[str, NDArray[np.float32]]
"""`key.<layer>` and `value.<layer>`, [B,H,C,D]."""

SEED = 2510_03215


@dataclass(frozen=True)
class CacheLayout:
    """The caches of one model."""

    num_layers: int
    num_heads: int
    capacity: int
    head_dim: int

    @property
    def names(self) -> list[str]:
        """In the order of the layers, a key before its value."""
        return [f"{kind}.{layer}" for layer in range(self.num_layers) for kind in ("key", "value")]

    @property
    def slot_bytes(self) -> int:
        """What one slot takes in float32."""
        return 2 * self.num_layers * self.num_heads * self.capacity * self.head_dim * 4

    def random(self, num_slots: int, sizes: Mapping[str, float], seed: int = SEED) -> Caches:
        """Normally distributed rows, each cache's with the standard deviation that `sizes` has for it, else 1."""
        generator = np.random.default_rng(seed)
        shape = (num_slots, self.num_heads, self.capacity, self.head_dim)
        return {
            name: generator.standard_normal(shape, dtype=np.float32) * np.float32(sizes.get(name, 1.0))
            for name in self.names
        }


def sizes_of(caches: Caches, num_rows: int) -> dict[str, float]:
    """The root mean square of the first rows of each cache."""
    return {name: float(np.sqrt(np.mean(np.square(array[:, :, :num_rows])))) for name, array in caches.items()}


def with_rows(caches: Caches, rows: Caches, num_rows: int) -> Caches:
    """Copies of the first slot of `caches`, their first rows taken from `rows`."""
    copies = {}
    for name, array in caches.items():
        copies[name] = array[:1].copy()
        copies[name][:, :, :num_rows] = rows[name][:1, :, :num_rows]
    return copies


def as_inputs(caches: Caches, prefix: str = "past_") -> Caches:
    """The caches under the names of a graph's inputs."""
    return {prefix + name: array for name, array in caches.items()}
