"""`C2CPipeline`: a bundle's engines, caches and tokenizers, and the calls that a user makes.

pipe = C2CPipeline.from_bundle("demo.bundle")
print(pipe.generate("Which country is the city of Porto in?").text)
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from c2c_export.bundle import Bundle, EngineRecord
from c2c_export.errors import C2CError, UsageError
from engines.cores import check_threads
from engines.select import open_engine, wanted_engines
from runtime.bundle_planner import BundlePlanner
from runtime.checked import refuse_failed, warn_of_unchecked
from runtime.conversation import Prompt, one_prompt
from runtime.decoder import Decoder
from runtime.engine_loader import EngineLoader
from runtime.freed_memory import return_freed_memory
from runtime.generation import Chunk, Generation
from runtime.messages import Message
from runtime.prefill import Prefiller
from runtime.prompt import Plan
from runtime.score import Score
from runtime.session import Session
from runtime.slot_state import SlotState


class C2CPipeline:
    """A loaded bundle. Open one per process; sessions share its engines and its pool of slots. Not thread-safe."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        precision: str | None,
        num_slots: int,
        num_threads: int | None,
        *,
        allow_unchecked: bool = False,
        allow_failed: bool = False,
        load_sharers: bool = True,
    ) -> None:
        """See `from_bundle`."""
        for name, count in (("num_slots", num_slots), ("num_threads", 1 if num_threads is None else num_threads)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UsageError(f"{name} is {count!r}, expected an integer of at least 1")
        if num_threads is not None:
            check_threads("num_threads", num_threads)
        wanted_engines(bundle, engine, precision)  # before the tokenizers are read, which takes seconds
        self.bundle = bundle

        def load(record: EngineRecord) -> Prefiller:
            if not allow_failed:
                refuse_failed(bundle, record)
            return EngineLoader(bundle, record, num_slots, num_threads).prefiller(load_sharers=load_sharers)

        self._planner = BundlePlanner(bundle)
        self.receiver_tokenizer = self._planner.receiver_tokenizer
        """With its special tokens and the chat template."""
        self.tokenizer: Tokenizer = self.receiver_tokenizer.backend
        return_freed_memory()  # before the engines take their own
        self.engine_choice, self.prefiller = open_engine(bundle, engine, precision, load)
        """The engine that runs, and why (`reason`)."""
        if not allow_unchecked:
            warn_of_unchecked(bundle, self.engine_choice.record)
        self.receiver = self.prefiller.receiver
        self._free_slots = list(range(num_slots))
        self._num_slots = num_slots

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        engine: str = "ort-cpu",
        precision: str | None = None,
        *,
        num_slots: int = 8,
        num_threads: int | None = None,
        allow_unchecked: bool = False,
        allow_failed: bool = False,
        load_sharers: bool = True,
    ) -> "C2CPipeline":
        """Open the bundle at `path` and load its engine of that name and precision.

        `engine="auto"` takes the best engine of the bundle that this machine can run and load; `engine_choice` says
        which and why. `precision` may be "auto" too; by default it is "fp32" for a named engine that has it, else
        "auto". `num_slots` is how many sessions may be open at once; their caches are allocated here and take memory
        when used (on a GPU at once). `num_threads` per engine on the CPU defaults to the physical cores. Raises
        `BundleError` when a file of the bundle is missing or changed, or contradicts the manifest, `UsageError` when it
        has no such engine, `C2CError` when it has and this machine cannot run it.

        An engine that `c2c-export check` found to fail is refused with a `FailedEngineError` ("auto" takes the next),
        one that it never checked gives an `UncheckedEngineWarning`, unless `allow_failed` or `allow_unchecked` is set.

        `load_sharers=False` loads the receiver and the fusers alone: what a sharer reads is computed elsewhere
        (`runtime.sharer_engine`) and comes with each request, which only a scheduler takes.
        """
        return cls(
            Bundle.open(path),
            engine,
            precision,
            num_slots,
            num_threads,
            allow_unchecked=allow_unchecked,
            allow_failed=allow_failed,
            load_sharers=load_sharers,
        )

    def prefill(self, prompt: Prompt, *, fuse: bool = True, sharers: Sequence[int] | None = None) -> Session:
        """Prefill and fuse a prompt: messages, a str (one user turn), or receiver token ids.

        `sharers` are the numbers of the sharers to use, all of them by default. `fuse=False`, or an empty list, is the
        receiver alone on its plain prompt. Raises `UsageError` for an empty or over-long prompt, or unknown sharers.
        """
        selected = self.select_sharers(fuse, sharers)
        if not self._free_slots:
            raise C2CError(
                f"all {self._num_slots} slots are in use; close a session, or load the bundle with a larger num_slots"
            )
        session = Session(self, self._free_slots.pop(), selected)
        try:
            session.begin(prompt)
        except BaseException:
            session.close()
            raise
        return session

    def generate(
        self,
        messages: str | Sequence[Any] | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        fuse: bool = True,
        sharers: Sequence[int] | None = None,
        **options: Any,
    ) -> Generation:
        """Prefill one prompt, `messages` or `input_ids`, and generate; `options` are those of `Session.stream`."""
        with self.prefill(one_prompt(messages, input_ids), fuse=fuse, sharers=sharers) as session:
            return session.generate(**options)

    def stream(
        self,
        messages: str | Sequence[Any] | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        fuse: bool = True,
        sharers: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """As `generate`, yielding `Chunk`s. When it returns, options are checked and the prompt is prefilled."""
        session = self.prefill(one_prompt(messages, input_ids), fuse=fuse, sharers=sharers)
        try:
            chunks = session.stream(**options)
        except BaseException:
            session.close()
            raise
        return _stream_and_close(session, chunks)

    def score(
        self,
        messages: str | Sequence[Any] | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        continuation: str | Sequence[int],
        fuse: bool = True,
        sharers: Sequence[int] | None = None,
    ) -> Score:
        """Prefill one prompt, `messages` or `input_ids`, and score what is said next, as `Session.score`.

        Several continuations of one prompt are better scored by one session, which prefills it once.
        """
        with self.prefill(one_prompt(messages, input_ids), fuse=fuse, sharers=sharers) as session:
            return session.score(continuation)

    def release_slot(self, slot: int, state: SlotState) -> None:
        """Make a session's slot, which holds `state`, free for another; sessions do it themselves."""
        try:
            if not self.prefiller.is_finite(slot, state):  # some engines add masked rows, times zero
                self.prefiller.clear(slot, state)
        finally:
            self._free_slots.append(slot)

    def make_plan(self, messages: list[Message] | None, ids: Sequence[int], sharers: tuple[int, ...]) -> Plan:
        """The plan for messages, or for ids when `messages` is None; `UsageError` when it exceeds the capacity."""
        return self._planner.plan(messages, ids, sharers)

    def select_sharers(self, fuse: bool, sharers: Sequence[int] | None) -> tuple[int, ...]:
        """The numbers of the sharers that a call uses. Raises `UsageError` for one that there is not."""
        available = range(len(self.bundle.manifest.sharers))
        if not fuse:
            return ()
        if sharers is None:
            return tuple(available)
        if isinstance(sharers, str) or not isinstance(sharers, Sequence):
            raise UsageError(f"sharers is {sharers!r}, expected a list of sharer numbers")
        for number in sharers:
            if isinstance(number, bool) or not isinstance(number, int) or number not in available:
                has = f"sharers 0 to {len(available) - 1}" if available else "no sharers"
                raise UsageError(f"sharer {number!r}: this bundle has {has}")
        return tuple(sorted(set(sharers)))

    def take_all_slots(self) -> range:
        """Take every slot, for good. Raises `C2CError` when a session holds one."""
        if len(self._free_slots) < self._num_slots:
            raise C2CError("sessions of this pipeline are open; close them before its slots are given to a scheduler")
        self._free_slots.clear()
        return range(self._num_slots)

    def continuation_ids(
        self, messages: list[Message] | None, ids: Sequence[int], generated: Sequence[int], text: str
    ) -> list[int]:
        """As `PromptPlanner.continuation_ids`."""
        return self._planner.continuation_ids(messages, ids, generated, text)

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """The models that are run, with their caches: the receiver, then the sharers that have open gates."""
        return (self.receiver, *self.prefiller.sharers.values())

    def read_receiver(self, slot: int, layer: int, num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies of the first rows of a receiver layer's key and value in a slot, each [Ht, num_rows, Dt]."""
        pool = self.receiver.pool
        return pool.read_rows(f"key.{layer}", slot, 0, num_rows), pool.read_rows(f"value.{layer}", slot, 0, num_rows)


def _stream_and_close(session: Session, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    with session:
        yield from chunks
