"""Proposes the tokens that a grammar forces, such as property names, as draft tokens."""

from rtp_llm.contract.request import Request

MIN_DRAFTS = 2  # fewer save less than a step with drafts costs more


class ForcedTokens:
    """Proposes as draft tokens those that a grammar forces, the only ones that it allows. One is rejected only where
    the reasoning budget forces another token.
    """

    needs_result = False

    def propose(self, request: Request) -> list[int]:
        position, tokens = request.forced_tokens
        drafts = tokens[request.num_computed_tokens - position :]
        return drafts if len(drafts) >= MIN_DRAFTS else []
