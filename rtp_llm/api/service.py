"""Generates text for all endpoints: combines the tokenizer, the chat template and the engine client."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence, Sized
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import Request

from rtp_llm.api import access_log
from rtp_llm.api.body_memory import BodyMemory
from rtp_llm.api.client import EngineClient
from rtp_llm.api.disconnect import until_disconnect
from rtp_llm.api.fields import FieldPolicy, FieldRecord
from rtp_llm.api.grammar_checker import GrammarChecker
from rtp_llm.api.preparation_process import T, Work
from rtp_llm.api.prepared import Prepared, PreparedResponse
from rtp_llm.api.preparer import THREAD_BYTES, Preparer
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.sampling_defaults import SamplingDefaults
from rtp_llm.api.text_stream import OutputChunk, TextParams, TextStream
from rtp_llm.config import Config
from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, engine_gone, timed_out
from rtp_llm.metrics import Metrics
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class SlotReservation:
    """The slots that one request has reserved for sequences that it has not started. `len` is their number.

    Each accepted sequence needs a slot; the server has CONCURRENCY_LIMIT + QUEUE_LIMIT of them. When a sequence starts,
    its slot leaves the reservation, and is free when the sequence ends. `release` frees the slots that are left.
    """

    def __init__(self, service: "Service", slots: int):
        self._service, self._slots = service, slots
        service.reserved_slots += slots

    def __len__(self) -> int:
        return self._slots

    def start_one(self) -> None:
        self._release(1)

    def return_one(self) -> None:
        """Returns the slot of a sequence that has just ended to the reservation, for the request's next sequence."""
        self._release(-1)

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
        formats: AnswerFormats,
        metrics: Metrics,
        client: EngineClient,
    ):
        self.config, self.model_name, self.tokenizer, self.template = config, name, tokenizer, template
        self.metrics, self.client = metrics, client
        self.model_names = (name, *config.served_model_names[1:])
        self.sampling_defaults = SamplingDefaults.from_config(config)
        names = self.model_names if config.strict_model_name else None
        self.field_policy = FieldPolicy(metrics, is_strict=config.strict_fields, model_names=names)
        self.preparer = Preparer(tokenizer, template, formats)
        self.body_memory = BodyMemory(config.max_body_mb)
        self.grammar_checker = GrammarChecker(self.preparer)
        self.created = int(time.time())
        self.reserved_slots = 0  # for sequences that have not started, so that `client.num_in_flight` lacks them

    # Before a request is accepted

    @property
    def engine_info(self) -> EngineInfo:
        """Returns properties of the model and the KV cache, as the engine reported them when it last became ready.
        Raises RequestError 503 if it has not been ready since the server started.
        """
        if self.client.info is None:
            raise engine_gone("the model is still loading: see /health")
        return self.client.info

    def admit(self, sequences: int) -> SlotReservation:
        """Reserves one slot per sequence.

        Raises RequestError 429 if too few are free, 400 if the server has fewer slots in total, 503 if it is stopping.
        """
        self.check_capacity(sequences)
        return SlotReservation(self, sequences)

    def admit_up_to(self, sequences: int) -> SlotReservation:
        """Reserves up to `sequences` slots, as many as are free. Raises RequestError 429 if none is, 503 if the server
        is stopping.
        """
        self.check_capacity(1)
        return SlotReservation(self, min(sequences, self._prompt_limits().free_slots))

    def check_capacity(self, sequences: int) -> None:
        """Raises RequestError 429 if fewer than `sequences` slots are free, 400 if the server has fewer in total, 503
        if it is stopping.
        """
        if self.client.is_draining:
            raise engine_gone("the server is stopping: retry, or use another server")
        with self._counted_rejections():
            self._prompt_limits().check_count(sequences)

    async def prepare(self, work: Work[T], request: Request) -> T:
        """Reads the request's body and calls `work`, a method that validates and tokenizes a body, with it. Returns the
        result of `work`.

        Raises RequestError 400 if the request is invalid; 404 for another model if STRICT_MODEL_NAME is set; 429 if a
        batch has more sequences than there are free slots, or too many large requests are waiting; 503 while the model
        is loading or the server stops; 504 if a large request waits too long. Raises ClientDisconnected or starlette's
        ClientDisconnect if the client disconnects.
        """
        async with self.read_body(request) as raw:
            return await self.prepare_body(work, request, raw)

    @asynccontextmanager
    async def read_body(self, request: Request) -> AsyncIterator[bytes]:
        """Context manager that reads the request's body and returns it. Raises RequestError 429 if the bodies of all
        requests that are being read or tokenized take too much memory.
        """
        with self._counted_rejections():
            async with self.body_memory.read(request) as raw:
                access_log.current().body_read = time.monotonic()
                yield raw

    async def prepare_body(self, work: Work[T], request: Request, raw: bytes, extra_bytes: int = 0) -> T:
        """Does what `prepare` does, with a body `raw` that has been read already.

        `extra_bytes`: size of the data that `work` reads besides the body, such as the history of a chat. Together with
        the size of `raw`, it decides whether `work` runs on the event loop, in a thread or in another process.
        """
        result, record = await self._prepare(work, request, raw, extra_bytes)
        self.field_policy.apply(record)
        prepared = result.chat if isinstance(result, PreparedResponse) else result
        if isinstance(prepared, Prepared) and prepared.grammar:
            await self.grammar_checker.check(prepared.grammar, prepared.constraint)
        return result

    async def _prepare(self, work: Work[T], request: Request, raw: bytes, extra_bytes: int) -> tuple[T, FieldRecord]:
        preparing = self.preparer.prepare(work, raw, self._prompt_limits(), extra_bytes)
        if len(raw) + extra_bytes < THREAD_BYTES:
            return await preparing
        timeout = min(self._timeouts(TextParams()))
        try:
            async with asyncio.timeout(timeout if timeout < math.inf else None):
                return await until_disconnect(request, preparing)
        except TimeoutError:
            raise timed_out(f"the request was not validated and tokenized within {timeout:g} s") from None

    @property
    def num_open(self) -> int:
        """Returns the number of slots in use: one per accepted sequence, and one per large request that is being
        tokenized. A graceful shutdown waits until it is 0.
        """
        return self.client.num_in_flight + self.reserved_slots + self.preparer.num_large

    def drain(self, seconds: float) -> None:
        """Rejects new requests and those that are still being tokenized with 503. Fails accepted ones that have not
        ended after `seconds`.
        """
        self.preparer.stop()
        self.client.drain(seconds)

    def _prompt_limits(self) -> PromptLimits:
        used_slots = self.num_open  # a large request counts as one sequence while it is prepared
        slots = self.config.concurrency_limit + self.config.queue_limit
        reason = f"CONCURRENCY_LIMIT={self.config.concurrency_limit} and QUEUE_LIMIT={self.config.queue_limit}"
        info = self.client.info
        if info is None:
            return PromptLimits(0, "", 0, slots, used_slots, reason)
        return PromptLimits(info.max_seq_len, info.max_seq_len_reason, info.vocab_size, slots, used_slots, reason)

    @contextmanager
    def _counted_rejections(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            if error.status == 429:
                self.metrics.rejections.labels(reason="max_num_queued_reqs").inc()
            raise

    def remaining_tokens(self, prompt: Sequence[int]) -> int:
        """Returns how many tokens can be generated after this prompt of token ids, up to the model's MAX_SEQ_LEN."""
        return self.engine_info.max_seq_len - len(prompt)

    # A request

    async def generate(
        self, prompt: list[int], params: SamplingParams, text_params: TextParams, reservation: SlotReservation
    ) -> AsyncGenerator[OutputChunk]:
        """Yields the output of one sequence in chunks of text. Closing the generator early aborts the sequence. Takes
        one slot of `reservation`.

        Raises RequestError 503 if a lost engine does not come back in time, 504 at the timeout, 500 if the sequence
        fails.
        """
        reservation.start_one()  # no await until `client.generate` counts it: another request could take the slot
        timer = RequestTimer(self.metrics, prompt, params)
        stream = TextStream(self.tokenizer, prompt, params, text_params)
        outputs = self.client.generate(secrets.token_hex(8), prompt, params)
        timeout, ttft_timeout = self._timeouts(text_params)
        started_at = access_log.current().body_read  # the event loop has the same clock
        try:
            while True:
                limit = timeout if stream.num_tokens else min(timeout, ttft_timeout)
                async with asyncio.timeout_at(started_at + limit if limit < math.inf else None):
                    output = await anext(outputs)
                chunk = stream.push(output)
                timer.on_output(chunk)
                yield chunk
                if chunk.finish_reason:
                    timer.on_finish(chunk.finish_reason, stream.num_tokens)
                    return
        except TimeoutError:
            timer.on_finish("error", stream.num_tokens)
            result = "was not finished" if stream.num_tokens or timeout <= ttft_timeout else "got no token"
            raise timed_out(f"the request {result} within {limit:g} s") from None
        except RequestError:
            timer.on_finish("error", stream.num_tokens)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            timer.on_finish("abort", stream.num_tokens)
            raise
        finally:
            await outputs.aclose()

    def _timeouts(self, text_params: TextParams) -> tuple[float, float]:
        """Returns the seconds until the last and until the first token; infinity if there is no limit."""
        settings = (self.config.max_rpc_timeout_ms, self.config.ttft_timeout_ms)
        limits = (text_params.timeout_ms, text_params.ttft_timeout_ms)
        milliseconds = [limit if limit > 0 else setting for limit, setting in zip(limits, settings, strict=True)]
        timeout, ttft_timeout = (ms / 1000 if ms > 0 else math.inf for ms in milliseconds)
        return timeout, ttft_timeout


class RequestTimer:
    """Adds the token counts and times of one sequence to the metrics and to the request's access log line."""

    def __init__(self, metrics: Metrics, prompt: Sized, params: SamplingParams):
        self.metrics, self._record = metrics, access_log.current().add_sequence(prompt)
        self.started_at = self.last_token_at = time.monotonic()
        self.first_token_at = 0.0
        self.queue_seconds = 0.0
        self.is_done = False
        metrics.prompt_tokens.inc(len(prompt))
        metrics.request_prompt_tokens.observe(len(prompt))
        metrics.params_max_tokens.observe(params.max_tokens)

    def on_output(self, output: EngineOutput | OutputChunk) -> None:
        now = time.monotonic()
        if output.tokens:
            self.metrics.generation_tokens.inc(len(output.tokens))
            self._record.output_tokens += len(output.tokens)
            if self.first_token_at:
                self.metrics.itl.observe(now - self.last_token_at)
            else:
                self.first_token_at, self.queue_seconds = now, output.queue_ms / 1000
                self.metrics.ttft.observe(now - self.started_at)
                self.metrics.prompt_tokens_cached.inc(output.cached_tokens)
                self._record.first_token_at, self._record.queue_ms = now, output.queue_ms
                self._record.cached_tokens = output.cached_tokens
            self.last_token_at = now

    def on_finish(self, reason: str, num_tokens: int) -> None:
        if self.is_done:
            return
        self.is_done = True
        self._record.finish = reason
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
