"""The prompt with which Qwen3-Reranker rates a document, as in its model card on the Hugging Face hub."""

from dataclasses import dataclass

from rtp_llm.errors import CheckpointError
from rtp_llm.text.tokenizer import Tokenizer

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_START = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_MARKERS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class RerankFormat:
    """The prompt format of a reranking model: token ids of its fixed parts, and the ids of "yes" and "no", from whose
    probabilities the score is computed.

    The prompt for a document is `start`, `question(…)`, a space and the document, and `end`. The parts are encoded
    separately, so that all documents of a query share the prefix. The ids are those of the whole text, because the
    pre-tokenizer splits between the parts anyway.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    yes: int
    no: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "RerankFormat":
        """Returns the format with this tokenizer's ids. Raises CheckpointError if it lacks a token of the format."""
        missing = [token for token in (*_MARKERS, "yes", "no") if tokenizer.token_id(token) is None]
        if missing:
            raise CheckpointError(
                f"TASK_TYPE=RERANKER: the tokenizer has no token {missing[0]!r}; allowed: a checkpoint that answers yes"
                " or no in the format of Qwen3-Reranker"
            )
        start, end = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (_START, _END))
        yes, no = (tokenizer.token_id(token) for token in ("yes", "no"))
        assert yes is not None, "checked above"
        assert no is not None, "checked above"
        return cls(start, end, yes, no)

    def question(self, query: str, instruction: str) -> str:
        """Returns the text of the prompt between `start` and the document, with the instruction and the query. It ends
        before the space that precedes the document.
        """
        return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>:"
