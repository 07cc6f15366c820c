"""One token more for every request that generates, in as few calls of the receiver as their slots allow.

In: requests that have a last token, and the slots beside theirs. Out: for each request its logits, or what its call
failed with. Which slots a call serves: `runtime.decode_ranges`.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.active_request import ActiveRequest
from runtime.decode_ranges import StepSlot, decode_ranges
from runtime.decoder import Decoder


def decode_step(
    receiver: Decoder, decoding: Sequence[ActiveRequest], spare: Mapping[int, int], max_slots: int | None
) -> Iterator[tuple[ActiveRequest, NDArray[np.float32] | Exception]]:
    """Each request with its logits [V], or the error of the call that served it.

    `spare` has, for other slots, the first row that may be written over: what lies between the requests' slots is
    computed too. An engine that was built for so many requests takes `max_slots` in a call.
    """
    by_slot = {active.slot: active for active in decoding}
    wanted = {
        slot: StepSlot(active.reply.token_ids[-1], active.next_position, active.state.num_rows)
        for slot, active in by_slot.items()
    }
    for slots, step in decode_ranges(wanted, spare, receiver.capacity, max_slots):
        served = [(slot, by_slot[slot]) for slot in slots if slot in by_slot]
        try:
            receiver.run_step(
                [token.token_id for token in step],
                [token.position_id for token in step],
                [token.row for token in step],
                slots.start,
            )
            logits = receiver.step_logits(len(slots))
        except Exception as error:
            yield from ((active, error) for _, active in served)
        else:
            yield from ((active, logits[slot - slots.start]) for slot, active in served)
