"""A session: one conversation in one slot, from its prompt through its generations and further turns."""

import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from c2c_export.errors import UsageError
from runtime.conversation import Conversation, Prompt, as_ids, is_ids
from runtime.generation import Chunk, Generation, Timings
from runtime.messages import Message, parse_messages
from runtime.prefill import PrefillTimings
from runtime.prompt import Plan, parse_ids
from runtime.reply import EndedBy, Reply, generation_limit
from runtime.sampling import Sampler, SamplingParams
from runtime.score import Score, score_tokens
from runtime.slot_state import SlotState

if TYPE_CHECKING:
    from runtime.pipeline import C2CPipeline


class Session:
    """The caches of one conversation. Made by `C2CPipeline.prefill`; holds its slot until closed or collected.

    Not thread-safe, and neither are two sessions of one pipeline at the same time.
    """

    def __init__(self, pipeline: "C2CPipeline", slot: int, sharers: tuple[int, ...]) -> None:
        self._pipeline = pipeline
        self._slot = slot
        self._sharers = sharers
        self._state = SlotState()
        # A session that is simply dropped gives its slot back too.
        self._release = weakref.finalize(self, pipeline.release_slot, slot, self._state)
        self._release.atexit = False
        self._conversation = Conversation(None, [])
        self._logits: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self._last_logits = self._logits
        self._next_position = 0
        self._reply_ids: list[int] = []
        # A stop token or string ends the text earlier than the ids: what it left of the first so many of them.
        self._cut_reply, self._num_cut_ids = "", 0
        self._current_stream: object = None
        self._prefill_seconds = 0.0
        self._timings = PrefillTimings(0.0, 0.0, 0.0)
        self._num_reused = 0

    @property
    def logits(self) -> NDArray[np.float32]:
        """A copy, float32 [V]: of the last prompt token (of its last padding row, where the prompt ends in padding)."""
        return self._logits.copy()

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """A copy, int64 [n]: the positions of the receiver's real rows, generated ones included."""
        return self._state.receiver.position_ids.copy()

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """A copy, int64 [n]: the token ids of the receiver's real rows, generated ones included."""
        return self._state.receiver.ids.copy()

    @property
    def slot(self) -> int:
        """The number of the pool's slot that holds this session's rows."""
        return self._slot

    @property
    def plan(self) -> Plan:
        """The prompt as it was planned: every model's tokens and positions, and the sections."""
        return self._plan

    def kv(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies of a receiver layer's key and value, each [Ht, n, Dt]: the real rows, fused where they were."""
        self._check_open()
        num_layers = self._pipeline.bundle.manifest.receiver.num_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise UsageError(f"layer {layer!r}: the receiver has layers 0 to {num_layers - 1}")
        return self._pipeline.read_receiver(self._slot, layer, self._state.num_rows)

    def append(self, prompt: Prompt) -> None:
        """Add turns (or ids, to a session of ids) and prefill what they change; equal to a fresh run over everything.

        What was generated since the last prompt counts as the assistant's turn before them, unless `prompt` begins
        with an assistant message itself.
        """
        if self._conversation.messages is None:
            ids = [*self._conversation.ids, *self._reply_ids, *as_ids(prompt)]
            self._start(Conversation(None, ids))
            return
        if is_ids(prompt):
            raise UsageError("this session holds messages; append messages, not token ids")
        messages = parse_messages(prompt)  # type: ignore[arg-type]
        answered = [Message("assistant", self._reply_text())] if self._reply_ids else []
        if messages[0].role == "assistant":
            answered = []
        self._start(Conversation([*self._conversation.messages, *answered, *messages], []))

    def generate(
        self,
        *,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Generation:
        """Generate until a stop token, a stop string, `max_new_tokens`, or the capacity; see `stream`."""
        generation = None
        for chunk in self.stream(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, stop=stop, **sampling):
            generation = chunk.generation
        assert generation is not None
        return generation

    def stream(
        self,
        *,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Generate, yielding text as soon as it is certain; a character or a possible stop string is never split.

        `max_new_tokens` None goes on to the capacity. `ignore_eos` goes on after stop tokens. `sampling` are the
        fields of `SamplingParams`. Raises `UsageError` for options out of range, or when prompt and `max_new_tokens`
        together exceed the capacity.
        """
        self._check_open()
        limit = generation_limit(max_new_tokens, self._state.num_rows, self._room(), self._capacity)
        stop_ids = () if ignore_eos else self._pipeline.bundle.manifest.stop_ids
        reply = Reply(self._pipeline.tokenizer, limit=limit, stop_ids=stop_ids, stop=stop)
        sampler = Sampler(SamplingParams.of(sampling))
        self._current_stream = reply
        return self._generate(reply, sampler)

    def begin_reply(self, reply: str | Sequence[int]) -> None:
        """Let the answer begin with `reply` (or go on with it), as if it had been generated.

        A later `generate` goes on from there, `score` scores what follows, and `append` counts it as the assistant's.
        Text is tokenised, and errors are raised, as in `score`.
        """
        self._check_open()
        ids = self._continuation_ids(reply)
        self._check_room(len(ids))
        self._current_stream = None
        for token_id in ids:
            if self._reply_ids:
                self._step(self._reply_ids[-1])
            self._add_to_reply(token_id, whole_text=None)

    def score(self, continuation: str | Sequence[int]) -> Score:
        """How likely `continuation` is next: after the prompt and what was generated since.

        The session stays as it is: a later `generate`, `stream` or `append` does what it would have done. Text is
        tokenised as it continues the prompt's text. n tokens take n - 1 decode steps (one more after a generation).
        Raises `UsageError` when the continuation has no tokens, unknown ones, or too many for the capacity, and when
        its beginning and the prompt's end would be one token.
        """
        self._check_open()
        ids = self._continuation_ids(continuation)
        self._check_room(len(ids))
        first_row, pending = self._state.num_rows, self._reply_ids[-1:]

        def step(index: int, token_id: int) -> NDArray[np.float32]:
            # Into rows that nobody sees, since the session does not count them; what comes next writes over them.
            self._pipeline.receiver.run(self._slot, [token_id], [self._next_position + index], first_row + index)
            return self._pipeline.receiver.logits()

        if not pending:
            return score_tokens(self._last_logits, ids, step)
        return score_tokens(step(0, pending[0]), ids, lambda index, token_id: step(1 + index, token_id))

    def close(self) -> None:
        """Give the slot back. The session cannot be used afterwards; closing it again does nothing."""
        self._release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, prompt: Prompt) -> None:
        """Prefill the first prompt; called once, by the pipeline."""
        self._start(Conversation.of(prompt))

    def _start(self, conversation: Conversation) -> None:
        self._check_open()
        started = time.perf_counter()
        self._plan = self._pipeline.make_plan(conversation.messages, conversation.ids, self._sharers)
        try:
            prefill = self._pipeline.prefiller.run(self._slot, self._state, self._plan)
            self._timings, self._num_reused = prefill.timings(), prefill.num_reused_rows
        except BaseException:  # an interrupt too: nobody knows what the caches hold
            self.close()
            raise
        self._conversation = conversation
        self._reply_ids, self._cut_reply, self._num_cut_ids = [], "", 0
        self._current_stream = None
        self._next_position = self._plan.num_positions
        self._logits = self._last_logits = self._pipeline.receiver.logits()
        self._prefill_seconds = time.perf_counter() - started

    def _continuation_ids(self, continuation: str | Sequence[int]) -> list[int]:
        if isinstance(continuation, str):
            conversation = self._conversation
            return self._pipeline.continuation_ids(
                conversation.messages, conversation.ids, self._reply_ids, continuation
            )
        ids: list[int] = parse_ids(continuation, "the continuation").tolist()
        vocab_size = len(self._logits)
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < vocab_size:
                raise UsageError(
                    f"token {index} of the continuation is {token_id}; expected ids from 0 to {vocab_size - 1}"
                )
        return ids

    def _check_open(self) -> None:
        if not self._release.alive:
            raise UsageError("this session is closed; prefill a new one")

    def _room(self) -> int:
        # How many tokens may follow; the last one's row is only written when something follows it.
        return self._capacity - (self._state.num_rows + bool(self._reply_ids)) + 1

    @property
    def _capacity(self) -> int:
        return self._pipeline.bundle.manifest.max_length

    def _check_room(self, num_tokens: int) -> None:
        if num_tokens > self._room():
            raise UsageError(
                f"the session's {self._state.num_rows} tokens and a continuation of {num_tokens} exceed the bundle's "
                f"capacity of {self._capacity}; shorten one, or export with a larger "
                "--max-length"
            )

    def _generate(self, reply: Reply, sampler: Sampler) -> Iterator[Chunk]:
        prefill, prefill_seconds, num_reused = self._timings, self._prefill_seconds, self._num_reused
        self._timings, self._prefill_seconds = PrefillTimings(0.0, 0.0, 0.0), 0.0
        num_prompt_tokens = len(self._plan.receiver.ids)
        reply_before = self._reply_text()
        seconds: list[float] = []
        while reply.ended_by is None:
            self._check_open()
            if self._current_stream is not reply:
                raise UsageError("this stream ended when its session went on with another stream or turn")
            started = time.perf_counter()
            token_id = self._next_token(sampler)
            text = reply.push(token_id)
            whole_text = None
            if reply.ended_by is EndedBy.STOP_TOKEN:
                whole_text = self._reply_text()
            elif reply.ended_by is EndedBy.STOP_STRING:
                whole_text = reply_before + reply.text
            self._add_to_reply(token_id, whole_text)
            seconds.append(time.perf_counter() - started)
            yield Chunk(text, [token_id])
        ended_by, rest = reply.ended_by, reply.finish()
        if reply.ended_by is not ended_by:
            self._add_to_reply(None, whole_text=reply_before + reply.text)
        timings = Timings(
            sharer_prefill=prefill.sharer_prefill,
            receiver_prefill=prefill.receiver_prefill,
            fuse=prefill.fuse,
            ttft=prefill_seconds + seconds[0],
            decode=sum(seconds[1:]),
        )
        generation = Generation(
            reply.text, reply.token_ids, reply.finish_reason, timings, num_prompt_tokens, num_reused
        )
        yield Chunk(rest, [], generation)

    def _next_token(self, sampler: Sampler) -> int:
        if self._reply_ids:
            self._step(self._reply_ids[-1])
        return sampler.sample(self._last_logits, self._state.receiver.ids)

    def _add_to_reply(self, token_id: int | None, whole_text: str | None) -> None:
        """Add a generated token; `whole_text`, if given, is what the reply says so far, whatever its ids decode to."""
        if token_id is not None:
            self._reply_ids.append(token_id)
        if whole_text is not None:
            self._cut_reply, self._num_cut_ids = whole_text, len(self._reply_ids)

    def _reply_text(self) -> str:
        rest = self._pipeline.tokenizer.decode(self._reply_ids[self._num_cut_ids :], skip_special_tokens=True)
        return self._cut_reply + rest

    def _step(self, token_id: int) -> None:
        row = self._state.num_rows
        self._pipeline.receiver.run(self._slot, [token_id], [self._next_position], row)
        self._state.append(token_id, self._next_position)
        self._next_position += 1
        self._last_logits = self._pipeline.receiver.logits()
