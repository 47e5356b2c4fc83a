"""The text of one sequence, as its outputs arrive from the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rtp_llm.contract.engine_output import EngineOutput, FinishReason, Logprob
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.text.detokenizer import Detokenizer
from rtp_llm.text.stop import StopChecker
from rtp_llm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextParams:
    """Parameters that the API process applies, not the engine: stop strings, detokenization, timeouts."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    visible_ids: frozenset[int] = frozenset()  # special tokens that are not skipped
    timeout_ms: int = 0  # 0 or less: MAX_RPC_TIMEOUT_MS applies
    ttft_timeout_ms: int = 0  # until the first token; 0 or less: TTFT_TIMEOUT_MS applies


@dataclass
class OutputChunk:
    """New text and tokens of one sequence. Only the sequence's last chunk has a finish reason and, if a stop string
    ended the sequence, this stop string.
    """

    text: str
    tokens: list[int]
    logprobs: Sequence[Logprob] = field(default_factory=list)
    prompt_logprobs: Sequence[Logprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    queue_ms: float = 0.0
    stop_string: str | None = None  # that ended the sequence


class TextStream:
    """Turns the output tokens of one sequence into text, which ends at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams, text_params: TextParams):
        self._params, self._text_params = params, text_params
        self._detokenizer = Detokenizer(
            tokenizer, text_params.skip_special_tokens, prompt, visible_ids=text_params.visible_ids
        )
        self._checker = StopChecker(text_params.stop, text_params.include_stop)
        self.num_tokens = 0  # so far

    def push(self, output: EngineOutput) -> OutputChunk:
        """Returns the engine's output as a chunk with text. With speculative decoding an output can have several
        tokens; those after a stop string are dropped.
        """
        num_tokens, text = self._read(output)
        self.num_tokens += num_tokens
        stop_string = self._checker.matched
        return OutputChunk(
            text,
            output.tokens[:num_tokens],
            output.logprobs[:num_tokens],
            output.prompt_logprobs,
            "stop" if stop_string else output.finish,
            output.cached_tokens,
            output.queue_ms,
            stop_string,
        )

    def _read(self, output: EngineOutput) -> tuple[int, str]:
        """Returns the number of tokens that count, and the text that can be sent."""
        tokens = output.tokens
        if output.finish == "stop" and not self._text_params.include_stop:
            tokens = tokens[:-1]  # without the stop token
        # A stop string may begin before min_tokens, but ends the text only if at least so many tokens are kept.
        num_exempt = max(0, self._params.min_tokens - 1 - self.num_tokens)
        exempt, others = tokens[:num_exempt], tokens[num_exempt:]
        text = self._checker.push_exempt(self._detokenizer.push(exempt)) if exempt else ""
        pieces = [[token] for token in others] if self._text_params.stop else [others]
        for num_read, piece in enumerate(pieces, len(exempt) + 1):
            sendable, matched = self._checker.push(self._detokenizer.push(piece))
            text += sendable
            if matched:
                return num_read, text
        if output.finish:
            text += self._checker.push(self._detokenizer.flush())[0]
            if not self._checker.matched:
                text += self._checker.flush()
        return len(output.tokens), text
