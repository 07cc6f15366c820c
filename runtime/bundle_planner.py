"""Prompts of one bundle planned without its engines: by its tokenizers, alignment tables and capacity.

In: a bundle, and messages or receiver token ids. Out: a `Plan` that fits the bundle's capacity, or an error. Not
covered: the plan itself, see `runtime.prompt`.
"""

from collections.abc import Sequence

import numpy as np

from c2c_export.bundle import Bundle
from c2c_export.errors import PromptTooLongError
from c2c_export.tokenizer import BundledTokenizer
from runtime.messages import Message
from runtime.prompt import Plan, PromptPlanner


class BundlePlanner:
    """See the module's docstring."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizers and tables, which takes seconds for large vocabularies.

        Raises `BundleError` where one is missing or broken.
        """
        self.bundle = bundle
        manifest = bundle.manifest
        self.receiver_tokenizer = BundledTokenizer.load(bundle.tokenizer_folder())
        """With its special tokens and the chat template."""
        numbers = range(len(manifest.sharers)) if manifest.aligned else range(0)
        self._planner = PromptPlanner(
            self.receiver_tokenizer,
            [BundledTokenizer.load(bundle.tokenizer_folder(number)) for number in numbers],
            [np.load(bundle.alignment_file(number)) for number in numbers],
            manifest.aligned,
            receiver_vocab=manifest.receiver.vocab_size,
            sharer_vocabs=[sharer.model.vocab_size for sharer in manifest.sharers],
        )

    def plan(self, messages: list[Message] | None, ids: Sequence[int], sharers: tuple[int, ...]) -> Plan:
        """The plan for messages, or for ids when `messages` is None; `PromptTooLongError` beyond the capacity."""
        if messages is None:
            plan = self._planner.plan_ids(ids, sharers=sharers)
        else:
            plan = self._planner.plan_messages(messages, sharers=sharers)
        needed = max(len(tokens.ids) for tokens in (plan.receiver, *plan.sharers.values()))
        needed += plan.closing_padding_id is not None
        capacity = self.bundle.manifest.max_length
        if needed > capacity:
            raise PromptTooLongError(
                f"the prompt takes {needed} tokens, this bundle's capacity is {capacity}; "
                "shorten it, or export with a larger --max-length"
            )
        return plan

    def continuation_ids(
        self, messages: list[Message] | None, ids: Sequence[int], generated: Sequence[int], text: str
    ) -> list[int]:
        """As `PromptPlanner.continuation_ids`."""
        return self._planner.continuation_ids(messages, ids, generated, text)
