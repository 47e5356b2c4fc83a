"""Runs the sequences of one embedding or reranking request: many short prompts that generate no text."""

import asyncio
import secrets
from collections.abc import Sequence

from starlette.requests import Request

from rtp_llm.api.pooling_preparation import PackedPrompt
from rtp_llm.api.service import RequestTimer, Service, SlotReservation
from rtp_llm.api.stream import cancel_on_disconnect
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, timed_out


async def final_outputs(
    request: Request, service: Service, prompts: Sequence[PackedPrompt], params: SamplingParams, timeout_ms: int | None
) -> list[EngineOutput]:
    """Returns the engine's last output for each prompt, in the order of the prompts.

    A prompt occupies a slot (a place for an accepted sequence) while it runs. The request takes as many slots as are
    free, at most twice the sequences of one engine step, so that the steps are full; further prompts wait for them.

    timeout_ms  limit for the whole request; None, 0 or less: MAX_RPC_TIMEOUT_MS

    Raises RequestError 429 if no slot is free, 504 at the timeout, 503 if the engine is lost or the server is stopping,
    500 if a sequence fails. The first error ends all sequences. Raises ClientDisconnected if the client disconnects.
    """
    reservation = service.admit_up_to(min(len(prompts), 2 * service.config.max_sequences))
    work = _run_all(service, prompts, params, reservation, _timeout_seconds(service, timeout_ms))
    return await cancel_on_disconnect(request, work, reservation)


def _timeout_seconds(service: Service, timeout_ms: int | None) -> float | None:
    milliseconds = timeout_ms if timeout_ms and timeout_ms > 0 else service.config.max_rpc_timeout_ms
    return milliseconds / 1000 if milliseconds > 0 else None


async def _run_all(
    service: Service,
    prompts: Sequence[PackedPrompt],
    params: SamplingParams,
    reservation: SlotReservation,
    seconds: float | None,
) -> list[EngineOutput]:
    outputs = [EngineOutput("")] * len(prompts)
    waiting = iter(enumerate(prompts))

    async def run_in_slot() -> None:
        for index, prompt in waiting:
            outputs[index] = await _run(service, prompt, params, reservation)

    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as slots:
            for _ in range(len(reservation)):
                slots.create_task(run_in_slot())
    except TimeoutError:
        raise timed_out(f"the request was not finished within {seconds:g} s") from None
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return outputs


async def _run(
    service: Service, prompt: PackedPrompt, params: SamplingParams, reservation: SlotReservation
) -> EngineOutput:
    reservation.start_one()  # no await until `client.generate` counts it: another request could take the slot
    timer = RequestTimer(service.metrics, prompt, params)
    outputs = service.client.generate(secrets.token_hex(8), prompt.token_ids(), params)
    output = EngineOutput("")
    try:
        async for output in outputs:
            timer.on_output(output)
    except RequestError:
        timer.on_finish("error", 0)
        raise
    except asyncio.CancelledError:
        timer.on_finish("abort", 0)
        raise
    finally:
        await outputs.aclose()
        reservation.return_one()
    timer.on_finish(output.finish or "error", len(output.tokens))
    return output
