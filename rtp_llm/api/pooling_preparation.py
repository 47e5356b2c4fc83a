"""Turns the bodies of embedding requests into validated requests and the token ids of their inputs.

As in `api.preparation`, the functions are synchronous and need only their arguments, so that they can run in another
process.
"""

import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rtp_llm.api.body import parse_body
from rtp_llm.api.field_names import named_field
from rtp_llm.api.pooling_schema import MAX_INPUTS, EmbeddingRequest, SimilarityRequest
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.schema import RequestBody
from rtp_llm.errors import empty_prompt, invalid_params, unsupported
from rtp_llm.parallel.part_spec import EmbeddingInfo

Body = TypeVar("Body", bound=RequestBody)


class PackedPrompt:
    """The token ids of one prompt as int32 bytes, which take a tenth of a list's memory. `parts` are concatenated;
    several prompts can share a part, such as a common prefix. `len` is the number of tokens.
    """

    def __init__(self, *parts: bytes):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts)) // 4

    def token_ids(self) -> list[int]:
        return array.array("i", b"".join(self._parts)).tolist()


@dataclass(frozen=True)
class PreparedInputs(Generic[Body]):
    """A validated embedding or rerank request: `prompts` are the token ids of its inputs, `body` lacks their texts."""

    body: Body
    prompts: list[PackedPrompt]


@dataclass(frozen=True)
class EmbeddingPreparation:
    """Turns the body of an embedding request into prompts: validates it and tokenizes its texts. Pass a method of this
    class as `work` to `Service.prepare`, which decides in which thread or process it runs.
    """

    info: EmbeddingInfo

    def embedding(self, preparation: Preparation, raw: bytes, limits: PromptLimits) -> PreparedInputs[EmbeddingRequest]:
        body = parse_body(EmbeddingRequest, raw)
        limits.check_engine()
        prefix, truncate = self._prefix(body), body.truncate_prompt_tokens
        one = isinstance(body.input, str) or (bool(body.input) and isinstance(body.input[0], int))
        inputs: Sequence[Any] = [body.input] if one else body.input
        if not inputs:
            raise empty_prompt("input is an empty list: send a text, texts, token ids or lists of token ids")
        if len(inputs) > MAX_INPUTS:
            raise invalid_params(f"input has {len(inputs)} items; allowed: at most {MAX_INPUTS}", "input")
        if truncate == 0:
            raise invalid_params(
                "truncate_prompt_tokens=0; allowed: 1 or more, or -1 for as many as fit", "truncate_prompt_tokens"
            )
        prompts = []
        for index, item in enumerate(inputs):
            with named_field("input" if one else f"input[{index}]"):
                text = prefix + item if item and isinstance(item, str) else item
                prompts.append(PackedPrompt(pack(preparation.encoder.encode_input(text, limits, truncate))))
        return PreparedInputs(body.model_copy(update={"input": ""}), prompts)

    def similarity(
        self, preparation: Preparation, raw: bytes, limits: PromptLimits
    ) -> PreparedInputs[SimilarityRequest]:
        """Returns the prompts of all `left` texts, then of all `right` texts. In the returned body, each `left` text is
        empty: only their number is needed, to find where the embeddings of the `right` texts begin.
        """
        body = parse_body(SimilarityRequest, raw)
        if body.return_response:
            raise unsupported("return_response is not supported: send the texts to /v1/embeddings", "return_response")
        if len(body.left) + len(body.right) > MAX_INPUTS:
            raise invalid_params(f"left and right have more than {MAX_INPUTS} texts together", "right")
        limits.check_engine()
        prompts, prefix = [], self.info.prompts.get(self.info.default_prompt, "")
        for name in ("left", "right"):
            for index, text in enumerate(getattr(body, name)):
                with named_field(f"{name}[{index}]"):
                    prompts.append(PackedPrompt(pack(preparation.encoder.encode_input(text and prefix + text, limits))))
        return PreparedInputs(body.model_copy(update={"left": [""] * len(body.left), "right": []}), prompts)

    def _prefix(self, body: EmbeddingRequest) -> str:
        """Returns the text that precedes each text of the input. Raises RequestError 400."""
        if body.prompt is not None:
            return body.prompt
        prompts = self.info.prompts
        if body.prompt_name is not None and body.prompt_name not in prompts:
            allowed = ", ".join(sorted(prompts)) or "none, as the checkpoint has no config_sentence_transformers.json"
            raise invalid_params(f"prompt_name={body.prompt_name!r} is unknown; allowed: {allowed}", "prompt_name")
        return prompts.get(self.info.default_prompt if body.prompt_name is None else body.prompt_name, "")


def pack(ids: Sequence[int]) -> bytes:
    return array.array("i", ids).tobytes()
