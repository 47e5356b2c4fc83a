"""The interface of speculative decoding: proposes draft tokens."""

from typing import Protocol

from rtp_llm.contract.request import Request


class DraftProposer(Protocol):
    """Guesses the next tokens of requests, which one step then verifies together."""

    def propose(self, request: Request) -> list[int]:
        """Returns draft tokens that may follow `request.tokens`, or an empty list. Called before each decode.

        The scheduler may drop the last ones, or all of them.
        """
        ...
