"""The payload of an EVENTS frame (`parallel.wire`): the outputs of a step for one client, and the engine's statistics.

The payload is binary, because rank 0 packs one after every step. Numbers that every output has, logprobs (which can be
megabytes) and hidden states are arrays in native byte order, as rank 0 and the API process run on one machine. Error
messages of failed requests are JSON.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, get_args, overload

import numpy as np

from rtp_llm.contract.engine_output import EngineOutput, FinishReason, Logprob

HEADER = struct.Struct("=IIII")  # outputs, bytes of all request ids, of the JSON, of the rare arrays
FINISH_REASONS: tuple[FinishReason | None, ...] = (None, *get_args(FinishReason))
OUTPUT = np.dtype(
    [("id_bytes", "u4"), ("num_tokens", "u4"), ("finish", "u1"), ("cached_tokens", "i4"), ("queue_ms", "f4")]
)
LOGPROB_FIELDS = ("logprobs", "prompt_logprobs")  # the JSON has their number of rows and of top tokens
LOGPROB = np.dtype([("value", "f4"), ("rank", "u4"), ("num_top", "u4")])
TOP_TOKEN = np.dtype([("id", "i4"), ("value", "f4")])


@dataclass(frozen=True)
class EngineStats:
    """Statistics of the engine after a step. Totals start at 0 when the ranks form a new communicator (a new epoch).

    running, waiting: current number of requests, each one sequence. kv_used: KV blocks in use by requests. step_tokens,
    step_seconds: tokens and duration of the last step; 0 if there was none. All others are totals; `runner.cost`
    estimates flops, read_bytes and write_bytes.
    """

    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    drafts: int = 0  # times that a step verified draft tokens of a request
    draft_tokens: int = 0  # draft tokens verified
    accepted_tokens: int = 0  # of these
    flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0


STATS_FIELDS = tuple(field.name for field in fields(EngineStats))
STATS = struct.Struct(f"={len(STATS_FIELDS)}d")  # counters beyond 2**53 lose their last digits


def pack_events(outputs: Sequence[EngineOutput], stats: EngineStats) -> bytes:
    """Returns the payload of an EVENTS frame: a step's outputs and statistics, from rank 0 to the API process."""
    ids = [output.request_id.encode() for output in outputs]
    table = np.array(
        [
            (len(id), len(o.tokens), FINISH_REASONS.index(o.finish), o.cached_tokens, o.queue_ms)
            for id, o in zip(ids, outputs, strict=True)
        ],
        OUTPUT,
    )
    tokens = np.array([token for output in outputs for token in output.tokens], np.int32)
    arrays: list[bytes] = []
    rare = {i: fields for i, output in enumerate(outputs) if (fields := _rare_fields(output, arrays))}
    text = json.dumps(rare, separators=(",", ":")).encode() if rare else b""
    header = HEADER.pack(len(outputs), len(b"".join(ids)), len(text), sum(map(len, arrays)))
    return b"".join((header, STATS.pack(*astuple(stats)), table.tobytes(), *ids, text, tokens.tobytes(), *arrays))


def unpack_events(data: bytes) -> tuple[list[EngineOutput], EngineStats]:
    """Decodes the result of `pack_events`. Raises ValueError if the lengths in its header do not match its size."""
    try:
        num_outputs, id_bytes, text_bytes, array_bytes = HEADER.unpack_from(data)
        values = STATS.unpack_from(data, HEADER.size)
        table = np.frombuffer(data, OUTPUT, num_outputs, HEADER.size + STATS.size)
    except (struct.error, ValueError) as error:
        raise ValueError(f"invalid EVENTS frame of {len(data)} bytes: {error}") from None
    ids_start = HEADER.size + STATS.size + table.nbytes
    text_start = ids_start + id_bytes
    tokens_start = text_start + text_bytes
    all_tokens = int(table["num_tokens"].sum())
    position = tokens_start + 4 * all_tokens
    if len(data) != position + array_bytes or id_bytes != table["id_bytes"].sum():
        raise ValueError(f"invalid EVENTS frame: its {len(data)} bytes do not match its header")
    tokens: list[int] = np.frombuffer(data, np.int32, all_tokens, tokens_start).tolist()
    outputs = []
    id_end, token_end = ids_start, 0
    for id_length, num_tokens, finish, cached_tokens, queue_ms in table.tolist():
        id_start, token_start = id_end, token_end
        id_end, token_end = id_start + id_length, token_start + num_tokens
        outputs.append(
            EngineOutput(
                data[id_start:id_end].decode(),
                tokens[token_start:token_end],
                finish=FINISH_REASONS[finish],
                cached_tokens=cached_tokens,
                queue_ms=queue_ms,
            )
        )
    for index, rare in (json.loads(data[text_start:tokens_start]) if text_bytes else {}).items():
        for name, value in rare.items():
            if name in LOGPROB_FIELDS:
                value = PackedLogprobs(data, position, *value)
                position += value.nbytes
            elif name == "hidden_state":  # the JSON has its number of bytes
                value = data[position : position + value]
                position += len(value)
            setattr(outputs[int(index)], name, value)
    counters: dict[str, Any] = dict(zip(STATS_FIELDS, map(int, values), strict=False))
    return outputs, EngineStats(**counters | {"step_seconds": values[-1]})


class PackedLogprobs(Sequence[Logprob]):
    """The logprobs of successive tokens, kept as bytes: each is decoded when it is accessed, because Python objects
    would take ten times the memory.
    """

    def __init__(self, data: bytes, start: int, num_rows: int, num_top: int):
        self._rows = np.frombuffer(data, LOGPROB, num_rows, start)
        self._top = np.frombuffer(data, TOP_TOKEN, num_top, start + self._rows.nbytes)
        self._ends = self._rows["num_top"].cumsum()
        self.nbytes = self._rows.nbytes + self._top.nbytes

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Logprob: ...
    @overload
    def __getitem__(self, index: slice) -> list[Logprob]: ...
    def __getitem__(self, index: int | slice) -> Logprob | list[Logprob]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        value, rank, num_top = self._rows[index].item()
        end = int(self._ends[index])
        return value, rank, self._top[end - num_top : end].tolist()


def _rare_fields(output: EngineOutput, arrays: list[bytes]) -> dict[str, Any]:
    """Returns the JSON of an output's rare fields, and appends its logprobs and hidden state to `arrays`."""
    rare: dict[str, Any] = {"error": output.error} if output.error else {}
    for name in LOGPROB_FIELDS:
        logprobs: Sequence[Logprob] = getattr(output, name)
        if logprobs:
            rows = np.array([(value, rank, len(top)) for value, rank, top in logprobs], LOGPROB)
            top_tokens = np.array([tuple(token) for _, _, top in logprobs for token in top], TOP_TOKEN)
            arrays.extend((rows.tobytes(), top_tokens.tobytes()))
            rare[name] = (len(rows), len(top_tokens))
    if output.hidden_state:
        arrays.append(output.hidden_state)
        rare["hidden_state"] = len(output.hidden_state)
    return rare
