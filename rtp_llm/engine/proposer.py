"""The interface of speculative decoding: proposes draft tokens."""

from typing import Protocol

from rtp_llm.contract.request import Request


class DraftProposer(Protocol):
    """Guesses the next tokens of requests (speculative decoding); one step then verifies several of them together.

    needs_result: whether `propose` needs all tokens of the request. The scheduler then waits for the result of each
        step before it schedules the next step of the request.
    """

    needs_result: bool

    def propose(self, request: Request) -> list[int]:
        """Returns draft tokens from position `request.num_computed_tokens` on, or an empty list.

        Called for each decode when it is scheduled; `num_computed_tokens` already includes the decode's token, the
        newest of the request. The scheduler may drop the last draft tokens, or all of them.
        """
        ...
