"""Generates text for all endpoints: combines the tokenizer, the chat template and the engine client."""

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

MAX_INLINE_CHARACTERS = 4096  # longer texts are encoded in a thread, to not block the event loop


@dataclass(frozen=True)
class TextParams:
    """Parameters of a request that the API process applies, not the engine: stop strings, detokenization, timeout."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    timeout_ms: int = 0  # 0 or less: MAX_RPC_TIMEOUT_MS applies


@dataclass
class OutputChunk:
    """New text of one sequence. Only the last chunk has a finish reason."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    queue_ms: float = 0.0


class SlotReservation:
    """Slots that one request has reserved for its sequences.

    Each sequence needs a slot; the server has CONCURRENCY_LIMIT + QUEUE_LIMIT of them. A sequence uses its slot when it
    starts; `release` frees the slots of sequences that did not start.
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
    """One served model: its tokenizer, its chat template and the connection to the engine."""

    def __init__(
        self,
        config: Config,
        name: str,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        metrics: Metrics,
        client: EngineClient,
    ):
        self.config, self.model_name, self.tokenizer, self.template = config, name, tokenizer, template
        self.metrics, self.client = metrics, client
        self.created = int(time.time())
        self.reserved_slots = 0  # for sequences that have not started, so that `client.num_in_flight` lacks them

    # Before a request is accepted

    @property
    def engine_info(self) -> EngineInfo:
        """Properties of the current or last engine. Raises RequestError 503 until the ranks have first loaded."""
        if self.client.info is None:
            raise engine_gone("the model is still loading: see /health")
        return self.client.info

    def admit(self, sequences: int) -> SlotReservation:
        """Reserves a slot per sequence. Raises RequestError 429 if too few are free, 503 if the server is stopping."""
        self.check_capacity(sequences)
        return SlotReservation(self, sequences)

    def check_capacity(self, sequences: int) -> None:
        """Raises the same errors as `admit`, but reserves nothing. Endpoints call it before encoding large batches."""
        if self.client.is_draining:
            raise engine_gone("the server is stopping: retry, or use another server")
        used_slots = self.client.num_in_flight + self.reserved_slots
        if sequences > self.config.concurrency_limit + self.config.queue_limit - used_slots:
            self.metrics.rejections.labels(reason="max_num_queued_reqs").inc()
            raise overloaded(
                f"{used_slots} sequences are open, {sequences} more do not fit: CONCURRENCY_LIMIT="
                f"{self.config.concurrency_limit} and QUEUE_LIMIT={self.config.queue_limit}; try again later"
            )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`. Raises RequestError 400 if it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid_format(
                f"the text has an unpaired surrogate at character {error.start}: not valid Unicode"
            ) from None
        if len(text) < MAX_INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def render(self, messages: Sequence[dict[str, Any]], /, **options: Any) -> str:
        """Returns the prompt of a chat. Raises RequestError 400 with the template's message."""
        try:
            return self.template.render(messages, **options)
        except TemplateError as error:
            raise invalid_params(str(error), "messages") from None

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises RequestError 400 if the prompt is empty, longer than MAX_SEQ_LEN - 1 tokens or has an id outside the
        vocabulary.
        """
        limit, vocab_size = self.engine_info.max_seq_len, self.engine_info.vocab_size
        if not prompt:
            raise empty_prompt()
        if len(prompt) >= limit:
            raise long_prompt(f"the prompt has {len(prompt)} tokens; at most {limit - 1} fit (MAX_SEQ_LEN={limit})")
        invalid_id = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if invalid_id is not None:
            raise invalid_params(f"token id {invalid_id} is outside the vocabulary of {vocab_size}", "prompt")

    def remaining_tokens(self, prompt: Sequence[int]) -> int:
        """Returns how many tokens can be generated after this prompt."""
        return self.engine_info.max_seq_len - len(prompt)

    # A request

    async def generate(
        self, prompt: list[int], params: SamplingParams, text_params: TextParams, reservation: SlotReservation
    ) -> AsyncGenerator[OutputChunk]:
        """Yields the chunks of one sequence. Closing the generator early aborts the sequence.

        Raises RequestError 503 if the engine is lost, 504 at the timeout, 500 if the sequence fails.
        """
        reservation.start_one()  # no await until `client.generate` counts it: another request could take the slot
        timer = RequestTimer(self.metrics, len(prompt), params)
        detokenizer = Detokenizer(self.tokenizer, text_params.skip_special_tokens, prompt)
        checker = StopChecker(text_params.stop, text_params.include_stop)
        outputs = self.client.generate(secrets.token_hex(8), prompt, params)
        timeout = self._timeout_seconds(text_params)
        deadline = asyncio.get_running_loop().time() + timeout if timeout else None
        num_tokens = 0
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    output = await anext(outputs)
                timer.on_output(output)
                num_tokens += len(output.tokens)
                chunk = self._chunk(output, detokenizer, checker, params, text_params, num_tokens)
                yield chunk
                if chunk.finish_reason:
                    timer.on_finish(chunk.finish_reason, num_tokens)
                    return
        except TimeoutError:
            timer.on_finish("error", num_tokens)
            raise timed_out(f"the request was not finished within {timeout:g} s") from None
        except RequestError:
            timer.on_finish("error", num_tokens)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            timer.on_finish("abort", num_tokens)
            raise
        finally:
            await outputs.aclose()

    def _chunk(
        self,
        output: EngineOutput,
        detokenizer: Detokenizer,
        checker: StopChecker,
        params: SamplingParams,
        text_params: TextParams,
        num_tokens: int,
    ) -> OutputChunk:
        """Returns the text chunk for `output`. `num_tokens`: tokens of the sequence so far, including this output."""
        tokens = output.tokens
        if output.finish == "stop" and not text_params.include_stop:
            tokens = tokens[:-1]  # without the stop token
        new_text = detokenizer.push(tokens) + (detokenizer.flush() if output.finish else "")
        # min_tokens disables stop strings as well as stop tokens.
        text, matched = checker.push(new_text) if num_tokens > params.min_tokens else (new_text, None)
        if output.finish and not matched:
            text += checker.flush()
            matched = checker.matched
        return OutputChunk(
            text,
            output.tokens,
            output.logprobs,
            output.prompt_logprobs,
            "stop" if matched else output.finish,
            output.cached_tokens,
            output.queue_ms,
        )

    def _timeout_seconds(self, text_params: TextParams) -> float | None:
        timeout_ms = text_params.timeout_ms if text_params.timeout_ms > 0 else self.config.max_rpc_timeout_ms
        return timeout_ms / 1000 if timeout_ms > 0 else None


class RequestTimer:
    """Records the metrics of one sequence."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, params: SamplingParams):
        self.metrics = metrics
        self.started_at = self.last_token_at = time.monotonic()
        self.first_token_at = 0.0
        self.queue_seconds = 0.0
        self.is_done = False
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.request_prompt_tokens.observe(prompt_tokens)
        metrics.params_max_tokens.observe(params.max_tokens)

    def on_output(self, output: EngineOutput) -> None:
        now = time.monotonic()
        if output.tokens:
            self.metrics.generation_tokens.inc(len(output.tokens))
            if self.first_token_at:
                self.metrics.itl.observe(now - self.last_token_at)
            else:
                self.first_token_at, self.queue_seconds = now, output.queue_ms / 1000
                self.metrics.ttft.observe(now - self.started_at)
                self.metrics.prompt_tokens_cached.inc(output.cached_tokens)
            self.last_token_at = now

    def on_finish(self, reason: str, num_tokens: int) -> None:
        if self.is_done:
            return
        self.is_done = True
        metrics, now = self.metrics, time.monotonic()
        metrics.success.labels(finished_reason=reason).inc()
        metrics.e2e.observe(now - self.started_at)
        metrics.request_generation_tokens.observe(num_tokens)
        if self.first_token_at:
            metrics.queue_time.observe(self.queue_seconds)
            metrics.prefill_time.observe(max(0.0, self.first_token_at - self.started_at - self.queue_seconds))
            metrics.decode_time.observe(self.last_token_at - self.first_token_at)
            metrics.inference_time.observe(max(0.0, self.last_token_at - self.started_at - self.queue_seconds))
            if num_tokens > 1:
                metrics.tpot.observe((self.last_token_at - self.first_token_at) / (num_tokens - 1))
