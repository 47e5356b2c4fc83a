"""Texts of a model that knows nothing: the product's sampler and logits processors, with random logits."""

from collections.abc import Callable
from pathlib import Path

import torch
from llguidance import LLMatcher
from torch import Tensor

from rtp_llm.config import Config
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.vocabulary import open_vocabulary
from rtp_llm.layers.sampler import Sampler
from rtp_llm.text.tokenizer import Tokenizer

MAX_SEQ_LEN = 4096
CPU = torch.device("cpu")
MakeLogits = Callable[[Request], Tensor]  # [vocab_size], of the next token


class Vocabulary:
    """A tokenizer and what makes logits for its tokens. The model has some ids more than the tokenizer."""

    def __init__(self, directory: Path, num_padding_ids: int = 40):
        self.tokenizer = Tokenizer.load(directory)
        self.size = self.tokenizer.vocab_size + num_padding_ids
        self.compiled = open_vocabulary(Config.model_validate({"checkpoint_path": str(directory)}), self.size).result()
        self.eos_ids = tuple(sorted(self.tokenizer.eos_ids))
        self._brief = torch.zeros(self.size)
        for token in range(self.tokenizer.vocab_size):
            if self.tokenizer.token_bytes(token).strip(b" \n,:") in (b'"', b"}", b"]", b'"}', b'"]', b"}]"):
                self._brief[token] = 6

    def brief_logits(self, request: Request) -> Tensor:
        """Returns random logits that prefer what ends a string, a list or an object."""
        generator = torch.Generator().manual_seed(request.params.seed * MAX_SEQ_LEN + len(request.tokens))
        return 2 * torch.randn(self.size, generator=generator) + self._brief

    def request(self, grammar: str, prompt: str = "a", seed: int = 0, id: str = "0", **params: object) -> Request:
        """Returns a request whose grammar is compiled. Fails if the grammar has an error."""
        defaults = {"max_tokens": 2000, "seed": seed, "grammar": grammar, "stop_token_ids": self.eos_ids}
        request = Request(id, self.tokenizer.encode(prompt), SamplingParams(**{**defaults, **params}))  # type: ignore[arg-type]
        request.matcher = LLMatcher(self.compiled, grammar, log_level=0)
        assert not request.matcher.get_error(), request.matcher.get_error()
        return request

    def generate(self, request: Request, make_logits: MakeLogits | None = None) -> str:
        """Samples until the request ends. Returns the text, without the token that stops it."""
        sampler = Sampler(1, self.size, CPU)
        sampler.reset(0, request)
        while not (finish := request.finish_reason(MAX_SEQ_LEN)):
            logits = (make_logits or self.brief_logits)(request)[None]
            rows = SampledRows.build([0], [len(request.tokens)])
            [sampled] = sampler.accept_drafts(sampler.sample(logits, rows), rows)
            assert not sampled.failed, request.error
            request.tokens += sampled.token_ids
        return self.tokenizer.decode(request.output[:-1] if finish == "stop" else request.output, False)
