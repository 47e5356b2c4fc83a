"""Where draft tokens come from."""

from typing import Protocol

from rtp_llm.contract.request import Request


class DraftProposer(Protocol):
    """Guesses the next tokens of requests, which one step then verifies together.

    needs_result: all of `request.tokens` must be known, so that no step of a request is scheduled before the result of
        the last one.
    """

    needs_result: bool

    def propose(self, request: Request) -> list[int]:
        """Returns the draft tokens from position `request.num_computed_tokens` on; empty if there is no guess.

        Called for each decode, whose token counts as computed. The scheduler may drop the last ones, or all.
        """
        ...
