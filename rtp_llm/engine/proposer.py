"""Where draft tokens come from."""

from typing import Protocol

from rtp_llm.contract.request import Request


class DraftProposer(Protocol):
    """Guesses the next tokens of requests, which one step then verifies together."""

    def propose(self, request: Request) -> list[int]:
        """Returns draft tokens, which follow `request.tokens`; empty if there is no guess. Called before each decode.

        The scheduler may drop the last ones, or all.
        """
        ...
