"""Proposes the tokens that a grammar forces, such as property names, as draft tokens, so that one step outputs them."""

from rtp_llm.contract.request import Request

MIN_DRAFTS = 2  # fewer save less than a step with drafts costs more


class ForcedTokens:
    """Proposes draft tokens where the grammar of a request allows only one next token (implements `DraftProposer`).

    Such a draft is rejected only if the reasoning budget forces another token there.
    """

    needs_result = False

    def propose(self, request: Request) -> list[int]:
        position, tokens = request.forced_tokens
        drafts = tokens[request.num_computed_tokens - position :]
        return drafts if len(drafts) >= MIN_DRAFTS else []
