"""Load the graphs of one engine of a bundle: receiver, sharers and fusers, all of them or one by itself.

In: an opened bundle and the record of one of its engines. Out: `Decoder`s with their caches, and `Fuser`s. Not covered:
which engine that is (`engines.select`), and whether it was checked (`runtime.checked`).
"""

from dataclasses import dataclass

from c2c_export.bundle import MANIFEST_NAME, Bundle, EngineRecord, ModelRecord
from c2c_export.errors import BundleError
from engines.base import Device, Engine
from engines.select import load_engine, new_device
from runtime.awaited_sharer import AwaitedSharer
from runtime.decoder import Decoder
from runtime.fuser import Fuser
from runtime.prefill import Prefiller


@dataclass(frozen=True)
class EngineLoader:
    """Every method raises `C2CError` where a graph cannot be loaded or memory is short, `BundleError` where the engine
    contradicts the manifest.
    """

    bundle: Bundle
    record: EngineRecord
    num_slots: int
    """Of every model's caches."""
    num_threads: int | None
    """Of each engine on the CPU; None is the physical cores."""

    def prefiller(self, *, load_sharers: bool = True) -> Prefiller:
        """Receiver, sharers and fusers; without sharers only the caches that hold their rows."""
        # Every model has a queue of its own, so that all prefill at once; a fuser changes the receiver's caches.
        device = new_device(self.record.target)
        receiver = self._decoder("receiver", self.bundle.manifest.receiver, device)
        computed = [
            number for number in range(len(self.bundle.manifest.sharers)) if f"fuser{number}" in self.record.graphs
        ]
        sharers = {number: self.sharer(number) for number in computed} if load_sharers else {}
        capacity = self.bundle.manifest.max_length
        fusers = {number: Fuser(self._graph(f"fuser{number}", device), capacity) for number in computed}
        if not load_sharers:
            sharers = {number: self._awaited_sharer(number, fuser) for number, fuser in fusers.items()}
        return Prefiller(receiver, sharers, fusers)

    def sharer(self, number: int) -> Decoder:
        """One sharer with its caches."""
        return self._decoder(
            f"sharer{number}", self.bundle.manifest.sharers[number].model, new_device(self.record.target)
        )

    def _awaited_sharer(self, number: int, fuser: Fuser) -> Decoder:
        engine = AwaitedSharer(number, fuser, new_device(self.record.target))
        return Decoder(engine, self.num_slots, self.bundle.manifest.max_length)

    def _decoder(self, name: str, model: ModelRecord, device: Device) -> Decoder:
        engine = self._graph(name, device)
        _check_capacity(self.bundle, name, engine)
        _check_vocabulary(self.bundle, name, model, engine)
        return Decoder(engine, self.num_slots, self.bundle.manifest.max_length, model.vocab_size)

    def _graph(self, name: str, device: Device) -> Engine:
        path = self.bundle.file(self.record.graphs[name])
        weights_folder = self.bundle.weights_folder(self.record)
        return load_engine(self.record.target, path, device, self.num_threads, weights_folder)


def _check_capacity(bundle: Bundle, name: str, engine: Engine) -> None:
    """Raise `BundleError` unless the manifest's capacity is that of the engine's caches, [B,H,C,D]."""
    max_length = bundle.manifest.max_length
    for spec in engine.inputs:
        if spec.name.startswith("past_") and spec.shape[2] != max_length:
            raise BundleError(
                f"{bundle.root / MANIFEST_NAME}: field max_length is {max_length}, expected {spec.shape[2]}, the rows "
                f"of the caches of {name}'s engine; export the bundle again"
            )


def _check_vocabulary(bundle: Bundle, name: str, model: ModelRecord, engine: Engine) -> None:
    """Raise `BundleError` where the manifest gives a model more ids than its engine has logits.

    An engine without logits, a sharer's, tells nothing of its vocabulary.
    """
    for spec in engine.outputs:
        if spec.name == "logits" and model.vocab_size > int(spec.shape[2]):
            raise BundleError(
                f"{bundle.root / MANIFEST_NAME}: field {name}.vocab_size is {model.vocab_size}, expected at most "
                f"{spec.shape[2]}, the number of its engine's logits; export the bundle again"
            )
