"""What a replica tells Serve of its health, so that Serve replaces one that cannot serve, and no other."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime import C2CError, UsageError
from runtime.prompt import ModelTokens
from runtime.server.ray import replicas
from runtime.server.ray.arguments import RayArguments
from runtime.server.ray.replicas import SharerReplica

PAIR = "llama_from_gemma3_aligned"

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def sharer(recorded_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> SharerReplica:
    monkeypatch.setattr(replicas, "log_as_json", lambda *_, **__: None)  # of the whole process
    bundle = str(recorded_bundle(PAIR))
    return SharerReplica(RayArguments(bundle=bundle, num_threads=1, allow_unchecked=True), 0)


def tokens(*ids: int) -> ModelTokens:
    return ModelTokens(np.array(ids), np.arange(len(ids)))


def test_a_sharer_whose_prompts_all_fail_is_not_healthy(sharer: SharerReplica, monkeypatch: pytest.MonkeyPatch):
    good = tokens(3, 4, 5)

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    asyncio.run(sharer.prefill(good))
    sharer.check_health()
    with monkeypatch.context() as broken:
        broken.setattr(type(sharer._engine._sharer), "run", fail)
        for number in range(3):
            sharer.check_health()
            with pytest.raises(RuntimeError):
                asyncio.run(sharer.prefill(tokens(7, 8, number)))
        with pytest.raises(C2CError, match="the last 3 prompts failed; the device is gone"):
            sharer.check_health()
    asyncio.run(sharer.prefill(tokens(9, 9, 9)))
    sharer.check_health()


def test_prompts_that_cannot_be_read_say_nothing_of_a_sharers_health(sharer: SharerReplica):
    for _ in range(5):
        with pytest.raises(UsageError):
            asyncio.run(sharer.prefill(tokens()))
    sharer.check_health()
