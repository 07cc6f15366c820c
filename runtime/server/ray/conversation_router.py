"""The request router of replicas that keep rows: Serve's consistent hashing, which waits longer for a busy replica."""

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class ConversationRouter(ConsistentHashRouter):
    """Sends all requests of a conversation, which is their `session_id`, to one replica while that has room.

    Before a request is sent, a replica is asked how many it has. One that is computing answers late; to go to another
    one after Serve's 0.1 s would cost the prefill of the whole conversation.
    """

    # Also what a request for a replica whose node is gone waits for, until Serve knows of it.
    queue_len_response_deadline_s = 1.0
    max_queue_len_response_deadline_s = 1.0
