"""Drafts of constrained requests: the tokens that their grammars force, such as the names of properties."""

from rtp_llm.contract.request import Request

MIN_DRAFTS = 2  # fewer save less than a step with drafts costs more


class ForcedTokens:
    """The proposer of grammars. A draft is rejected only where a budget of reasoning forces other tokens."""

    needs_result = False

    def propose(self, request: Request) -> list[int]:
        position, tokens = request.forced_tokens
        drafts = tokens[request.num_computed_tokens - position :]
        return drafts if len(drafts) >= MIN_DRAFTS else []
