"""The harness's model `c2c`: a bundle that scores continuations and answers prompts.

In: the harness's requests. Out: log-likelihoods and texts. What a context means:

- *Raw text* (no `--apply_chat_template`) is given as token ids, tokenised as the harness's own `hf` model does it, so
  that with `fuse=false` both give the same numbers. All ids but the last are fused, in an aligned pair through the
  alignment table. As with `hf`, it is cut from the left where it does not fit the capacity.
- A *chat* (`--apply_chat_template`) is given as messages, planned and fused like any other, and never cut. An answer
  that the task begins (`gen_prefix`) is begun: unfused, as all that is generated.
- A *rolling* log-likelihood has no prompt that could be fused: it is the receiver's own, whatever `fuse` says.

Requests are checked and tokenised before the first is computed. Those with the same context share its prefill, and
each token of a continuation but the last takes a decode step. Not covered: batches, images, audio.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import c2c_export
from c2c_export.errors import C2CError, UsageError
from c2c_export.lm_eval.arguments import check_batch_size, parse_arguments
from c2c_export.lm_eval.capacity import Capacity
from c2c_export.lm_eval.contexts import ChatContext, render_chat
from c2c_export.lm_eval.gen_kwargs import GenerationOptions, parse_gen_kwargs
from c2c_export.tokenizer import CHAT_TEMPLATE_NAME, SPECIAL_TOKENS_NAME, TOKENIZER_NAME
from engines.targets import target_of
from runtime import C2CPipeline, Session
from runtime.conversation import Prompt

_RENDERING_FILES = (TOKENIZER_NAME, SPECIAL_TOKENS_NAME, CHAT_TEMPLATE_NAME)
_FINGERPRINT_KEY = "c2c fingerprint"
"""Where a cache of answers says whose they are; the harness's own keys are hashes."""
_CONTEXTS_KEY = "c2c contexts"
"""Where it says what they answer: the harness keys a chat by its rendered text alone, as raw text would be."""


class C2CLanguageModel(TemplateLM):
    """See the module's docstring. The harness makes one from `--model_args`, see `Arguments`."""

    def __init__(
        self,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **model_args: Any,
    ) -> None:
        """Open the bundle. Raises `UsageError` for wrong arguments, otherwise as `C2CPipeline.from_bundle`.

        `device` means nothing: the engine decides where it runs, and the harness's default is "cuda:0".
        """
        super().__init__()
        check_batch_size(batch_size, max_batch_size)
        self._arguments = arguments = parse_arguments(model_args)
        self._pipeline = C2CPipeline.from_bundle(
            arguments.bundle,
            arguments.engine,
            arguments.precision,
            num_slots=1,
            num_threads=arguments.num_threads,
            allow_unchecked=arguments.allow_unchecked,
            allow_failed=arguments.allow_failed,
        )
        self._tokenizer = self._pipeline.receiver_tokenizer
        self._has_chats = False
        with self._pipeline.prefill([self.prefix_token_id], fuse=arguments.fuse, sharers=arguments.sharers) as session:
            self._sharers = tuple(sorted(session.plan.sharers))

    @property
    def eot_token_id(self) -> int:
        """The receiver's end token. Raises `C2CError` if its tokenizer has none."""
        end_id = self._tokenizer.special.end_id
        if end_id is None:
            raise C2CError("the receiver's tokenizer has no end token, which stands for an empty context")
        return end_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the begin token, or the end token where there is none, as with `hf`."""
        begin_id = self._tokenizer.special.begin_id
        return self.eot_token_id if begin_id is None else begin_id

    @property
    def tokenizer_name(self) -> str:
        """What the rendered requests depend on, for the harness's cache of them; it asks in runs of chats only."""
        self._begin_chats()
        files = self._pipeline.bundle.manifest.files
        return "c2c-" + "-".join(files[f"tokenizers/receiver/{name}"][:16] for name in _RENDERING_FILES)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The receiver's chat template. Raises `UsageError` for a template's name: a bundle has one template."""
        if isinstance(chat_template, str):
            raise UsageError(f"--apply_chat_template {chat_template}: a bundle has one chat template; give no name")
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> ChatContext:
        """The chat as the receiver reads it, see `render_chat`."""
        self._begin_chats()
        return render_chat(self._tokenizer, chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to its results: which engine of which bundle answered, and with which sharers.

        Raises `UsageError` where a cache of answers has those to other contexts than the run's: only now is it sure
        that a run without requests to compute has no chats.
        """
        self._check_cached_contexts()
        return self._info()

    def _info(self) -> dict[str, Any]:
        choice, manifest = self._pipeline.engine_choice, self._pipeline.bundle.manifest
        engine = f"{choice.target}-{choice.precision}"
        return {
            "bundle": str(self._pipeline.bundle.root),
            "engine": engine,
            "sharers": list(self._sharers),
            "receiver": manifest.receiver.source,
            "fingerprint": self._arguments.fingerprint(manifest, engine, _versions(choice.target)),
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the harness's cache of answers. Raises `UsageError` if it holds those of another model.

        The harness looks an answer up by the request alone.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            mine = self._info()["fingerprint"]
            if len(answers) and answers.get(_FINGERPRINT_KEY) != mine:
                raise UsageError(
                    f"--use_cache: {answers.filename} holds the answers of another model, or of this one with other "
                    "arguments; name another file"
                )
            answers[_FINGERPRINT_KEY] = mine
        self._has_chats = False
        super().set_cache_hook(cache_hook)

    def _begin_chats(self) -> None:
        self._has_chats = True
        self._check_cached_contexts()

    def _check_cached_contexts(self, will_answer: bool = False) -> None:
        """Raise `UsageError` if the cache of answers has those to other contexts; mark it with ours before any."""
        answers = self.cache_hook.dbdict
        if answers is None:
            return
        mine = "chats" if self._has_chats else "raw contexts"
        theirs = answers.get(_CONTEXTS_KEY, mine)
        if theirs != mine:
            raise UsageError(
                f"--use_cache: {answers.filename} holds answers to {theirs}, this run has {mine}; name another file"
            )
        if will_answer:
            answers[_CONTEXTS_KEY] = mine

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of raw text, as `hf` has them: with what the tokenizer adds, unless it is there already."""
        if add_special_tokens is None:
            add_special_tokens = self._arguments.add_bos_token
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._tokenizer.decode([self.prefix_token_id]))
        ids: list[int] = self._tokenizer.backend.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Of a chat: the ids of the beginning of its reply, and those that the continuation adds."""
        if not isinstance(context, ChatContext):
            return super()._encode_pair(context, continuation)
        begun = self._reply_ids(context, context.reply) if context.reply else []
        return begun, self._reply_ids(context, context.reply + continuation)[len(begun) :]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Score what `loglikelihood` tokenised, context by context; answers in the order of the requests."""
        self._check_cached_contexts(will_answer=True)
        capacity = self._capacity()
        by_context: dict[object, list[int]] = {}
        jobs: list[tuple[Prompt, list[int], list[int]]] = []
        for index, ((context, continuation), context_ids, ids) in enumerate(requests):
            if not ids:
                raise UsageError(f"the continuation {continuation!r} has no tokens of its own after its context")
            if isinstance(context, ChatContext):
                capacity.check(self._num_rows(context), len(context_ids) + len(ids))
                by_context.setdefault(context.messages, []).append(index)
                jobs.append((context.messages, context_ids, ids))
            else:
                kept = capacity.cut(context_ids, len(ids))
                by_context.setdefault(tuple(kept), []).append(index)
                jobs.append((kept, [], ids))
        capacity.warn()

        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as progress:
            for indices in by_context.values():
                with self._pipeline.prefill(jobs[indices[0]][0], sharers=self._sharers) as session:
                    for index in indices:
                        begun, ids = jobs[index][1:]
                        answers[index] = _score(session, begun, ids)
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                        progress.update()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The receiver's log-likelihood of whole texts, in windows of the capacity, as with `hf`."""
        self._check_cached_contexts()
        texts = [str(request.args[0]) for request in requests]
        answers = []
        for text in tqdm(texts, desc="Running loglikelihood_rolling requests", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._pipeline.bundle.manifest.max_length, context_len=1
            )
            total = 0.0
            for context_ids, ids in map(make_disjoint_window, windows):
                with self._pipeline.prefill(context_ids, fuse=False) as session:
                    total += session.score(ids).log_likelihood
            answers.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts, each up to one of its `until` (which the answer lacks) or its `max_gen_toks`."""
        self._check_cached_contexts(will_answer=True)
        capacity = self._capacity()
        jobs: list[tuple[Prompt, list[int], GenerationOptions]] = []
        for context, values in (request.args for request in requests):
            options = parse_gen_kwargs(values, self._arguments.max_gen_toks)
            if isinstance(context, ChatContext):
                begun = self._reply_ids(context, context.reply) if context.reply else []
                room = capacity.room(self._num_rows(context) + len(begun), options.max_new_tokens)
                jobs.append((context.messages, begun, replace(options, max_new_tokens=room)))
            else:
                ids = self.tok_encode(context) or [self.prefix_token_id]
                # One more than needed, as with `hf`.
                jobs.append((capacity.cut(ids, options.max_new_tokens + 1), [], options))
        capacity.warn()

        answers = []
        for request, (prompt, begun, options) in zip(
            requests, tqdm(jobs, desc="Running generate_until requests", disable=disable_tqdm), strict=True
        ):
            with self._pipeline.prefill(prompt, sharers=self._sharers) as session:
                if begun:
                    session.begin_reply(begun)
                answers.append(self._generate(session, options))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _capacity(self) -> Capacity:
        return Capacity(self._pipeline.bundle.manifest.max_length)

    def _num_rows(self, context: ChatContext) -> int:
        # Planning refuses a prompt that no model of the pair, or no chat template, takes.
        return len(self._pipeline.make_plan(list(context.messages), [], self._sharers).receiver.ids)

    def _reply_ids(self, context: ChatContext, reply: str) -> list[int]:
        return self._pipeline.continuation_ids(list(context.messages), [], [], reply)

    def _generate(self, session: Session, options: GenerationOptions) -> str:
        sampling = dict(options.sampling)
        if options.samples:
            sampling["seed"] = int(np.random.randint(2**31))  # of the generator that the harness's --seed sets
        added = self._tokenizer.backend.get_added_tokens_decoder().items()
        # Text has no special tokens, so a stop string that is one would never be found.
        stop_ids = {token_id for token_id, token in added if token.special and token.content in options.stop}
        token_ids: list[int] = []
        for chunk in session.stream(max_new_tokens=options.max_new_tokens, stop=options.stop, **sampling):
            if chunk.generation is not None:
                return chunk.generation.text
            if not stop_ids.isdisjoint(chunk.token_ids):
                break
            token_ids += chunk.token_ids
        return self._tokenizer.backend.decode(token_ids, skip_special_tokens=True)


def _versions(target: str) -> dict[str, str]:
    module = target_of(target).module
    return {"c2c-export": c2c_export.__version__, module: str(importlib.import_module(module).__version__)}


def _score(session: Session, begun: list[int], ids: list[int]) -> tuple[float, bool]:
    """Log-likelihood, and whether it is greedy, of `ids` after a reply that has `begun`."""
    score = session.score([*begun, *ids])
    return sum(score.log_probabilities[len(begun) :]), all(score.greedy[len(begun) :])
