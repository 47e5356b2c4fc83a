"""Text in, text out: the tokenizer, the chat template and the engine client together, for all endpoints alike."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.api.client import EngineClient
from rtp_llm.config import Config
from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput, FinishReason, Logprob
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import (
    RequestError,
    empty_prompt,
    engine_gone,
    invalid_format,
    invalid_params,
    long_prompt,
    overloaded,
    timed_out,
)
from rtp_llm.metrics import Metrics
from rtp_llm.text.detokenizer import Detokenizer
from rtp_llm.text.stop import StopChecker
from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LONG_TEXT = 4096  # characters from which on encoding leaves the event loop to a thread


@dataclass(frozen=True)
class TextParams:
    """What the engine does not know of: stop strings, and how ids become text."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    timeout_ms: int = 0  # 0: the server's own limit


@dataclass
class OutputChunk:
    """New text of one sequence; the last one has a finish reason."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0
    queue_ms: float = 0.0


class SlotReservation:
    """Places that were promised to the sequences of one request. A sequence that starts takes its own; `release`
    gives back those that never did.
    """

    def __init__(self, service: "Service", slots: int):
        self._service, self._slots = service, slots
        service.reserved_slots += slots

    def start_one(self) -> None:
        self._release(1)

    def release(self) -> None:
        self._release(self._slots)

    def _release(self, slots: int) -> None:
        self._slots -= slots
        self._service.reserved_slots -= slots


class Service:
    """One served model."""

    def __init__(
        self,
        config: Config,
        name: str,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        metrics: Metrics,
        client: EngineClient,
    ):
        self.config, self.name, self.tokenizer, self.template = config, name, tokenizer, template
        self.metrics, self.client = metrics, client
        self.created = int(time.time())
        self.reserved_slots = 0  # slots of admitted sequences that have not started: they are in no ledger yet

    # Before a request is accepted

    @property
    def engine(self) -> EngineInfo:
        """Raises RequestError 503 until the ranks have loaded for the first time."""
        if self.client.info is None:
            raise engine_gone("the model is still loading: see /health")
        if self.client.info is None:
            raise engine_gone("the model is still loading: see /health")
        return self.client.info

    def admit(self, sequences: int) -> SlotReservation:
        """A place for each sequence. Raises RequestError 429 where batch and queue are full."""
        self.check_capacity(sequences)
        return SlotReservation(self, sequences)

    def check_capacity(self, sequences: int) -> None:
        """As `admit`, without taking the slots: called before the work of encoding what could only be refused."""
        if self.client.draining:
            raise engine_gone("the server is stopping: send this again, or elsewhere")
        taken = self.client.num_in_flight + self.reserved_slots
        if sequences > self.config.concurrency_limit + self.config.queue_limit - taken:
            self.metrics.rejections.labels(reason="max_num_queued_reqs").inc()
            raise overloaded(
                f"{taken} sequences are open, {sequences} more do not fit: CONCURRENCY_LIMIT="
                f"{self.config.concurrency_limit} and QUEUE_LIMIT={self.config.queue_limit}; try again later"
            )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises RequestError 400 for text that is not Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid_format(
                f"the text has a lone surrogate at character {error.start}: not valid Unicode"
            ) from None
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def render(self, messages: Sequence[dict[str, Any]], /, **options: Any) -> str:
        """Raises RequestError 400 with the template's own complaint."""
        try:
            return self.template.render(messages, **options)
        except TemplateError as error:
            raise invalid_params(str(error), "messages") from None

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises RequestError 400: empty, too long to leave room for one token, or an id the model does not have."""
        limit, vocab = self.engine.max_seq_len, self.engine.vocab_size
        if not prompt:
            raise empty_prompt()
        if len(prompt) >= limit:
            raise long_prompt(f"the prompt has {len(prompt)} tokens; at most {limit - 1} fit (MAX_SEQ_LEN={limit})")
        wrong = next((t for t in prompt if not 0 <= t < vocab), None)
        if wrong is not None:
            raise invalid_params(f"token id {wrong} is outside the vocabulary of {vocab}", "prompt")

    def remaining_tokens(self, prompt: Sequence[int]) -> int:
        """Tokens that can still be generated behind this prompt."""
        return self.engine.max_seq_len - len(prompt)

    # A request

    async def generate(
        self, prompt: list[int], params: SamplingParams, text: TextParams, admission: SlotReservation
    ) -> AsyncGenerator[OutputChunk]:
        """Chunks of one sequence. Raises RequestError 503 or 504 where it cannot be finished; leaving early aborts
        it.
        """
        admission.start_one()  # nothing is awaited between here and its entry in the ledger
        watch = RequestTimer(self.metrics, len(prompt), params)
        detokenizer = Detokenizer(self.tokenizer, text.skip_special_tokens, prompt)
        checker = StopChecker(text.stop, text.include_stop)
        events = self.client.generate(secrets.token_hex(8), prompt, params)
        seconds = self._seconds(text)
        deadline = asyncio.get_running_loop().time() + seconds if seconds else None
        produced = 0
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events)
                watch.on(event)
                produced += len(event.tokens)
                chunk = self._chunk(event, detokenizer, checker, params, text, produced)
                yield chunk
                if chunk.finish:
                    watch.finished(chunk.finish, produced)
                    return
        except TimeoutError:
            watch.finished("error", produced)
            raise timed_out(f"not finished within {seconds:g} s") from None
        except RequestError:
            watch.finished("error", produced)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            watch.finished("abort", produced)
            raise
        finally:
            await events.aclose()

    def _chunk(
        self,
        event: EngineOutput,
        detokenizer: Detokenizer,
        checker: StopChecker,
        params: SamplingParams,
        text: TextParams,
        produced: int,
    ) -> OutputChunk:
        shown = event.tokens
        if event.finish == "stop" and not text.include_stop:
            shown = shown[:-1]  # the stop token itself
        new = detokenizer.push(shown) + (detokenizer.flush() if event.finish else "")
        # Stop strings count from min_tokens on, as stop tokens do.
        safe, matched = checker.push(new) if produced > params.min_tokens else (new, None)
        if event.finish and not matched:
            safe += checker.flush()
            matched = checker.matched
        finish: FinishReason | None = "stop" if matched else event.finish
        return OutputChunk(
            safe, event.tokens, event.logprobs, event.prompt_logprobs, finish, event.cached_tokens, event.queue_ms
        )

    def _seconds(self, text: TextParams) -> float | None:
        limit = text.timeout_ms if text.timeout_ms > 0 else self.config.max_rpc_timeout_ms
        return limit / 1000 if limit > 0 else None


class RequestTimer:
    """Feeds the latency histograms of one sequence."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, params: SamplingParams):
        self.metrics = metrics
        self.started = self.last = time.monotonic()
        self.first = 0.0
        self.queue = 0.0
        self.done = False
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.request_prompt_tokens.observe(prompt_tokens)
        metrics.params_max_tokens.observe(params.max_tokens)

    def on(self, event: EngineOutput) -> None:
        now = time.monotonic()
        if event.tokens:
            self.metrics.generation_tokens.inc(len(event.tokens))
            if self.first:
                self.metrics.itl.observe(now - self.last)
            else:
                self.first, self.queue = now, event.queue_ms / 1000
                self.metrics.ttft.observe(now - self.started)
                self.metrics.prompt_tokens_cached.inc(event.cached_tokens)
            self.last = now

    def finished(self, reason: str, tokens: int) -> None:
        if self.done:
            return
        self.done = True
        metrics, now = self.metrics, time.monotonic()
        metrics.success.labels(finished_reason=reason).inc()
        metrics.e2e.observe(now - self.started)
        metrics.request_generation_tokens.observe(tokens)
        if self.first:
            metrics.queue_time.observe(self.queue)
            metrics.prefill_time.observe(max(0.0, self.first - self.started - self.queue))
            metrics.decode_time.observe(self.last - self.first)
            metrics.inference_time.observe(max(0.0, self.last - self.started - self.queue))
            if tokens > 1:
                metrics.tpot.observe((self.last - self.first) / (tokens - 1))
