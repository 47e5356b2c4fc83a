"""Measures the speed of a model of realistic size: ours, that of transformers, and the bound of memory bandwidth.

The tests report speeds and never assert them. The weights are random, which does not change the cost.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.runner.model_runner import ModelRunner
from tests.gpu.plugin import Note
from tests.model import drive
from tests.model.conftest import _one_thread  # noqa: F401  # for this process, too

MIB = 1 << 20
CONTEXT = 40960
# Of Qwen3-0.6B.
REALISTIC = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
TINY = Qwen3Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    dtype="float32",
)
PROMPT = 128  # tokens of each sequence before decoding is timed
ENDLESS = 10_000  # tokens: until it is aborted
WARM_STEPS = 4
REPEATS = 3


@dataclass(frozen=True)
class Scale:
    """What the tests measure on one kind of device."""

    config: Qwen3Config
    steps: int
    long_prompt: int
    copied: int  # bytes, for the bandwidth of memory


SCALES = {
    "cuda": Scale(REALISTIC, steps=32, long_prompt=4096, copied=1024 * MIB),
    "cpu": Scale(TINY, steps=16, long_prompt=512, copied=128 * MIB),
}


@dataclass(frozen=True)
class Subject:
    """One model: that of transformers in memory, and its checkpoint on disk."""

    scale: Scale
    device: torch.device
    theirs: PreTrainedModel
    path: Path
    bandwidth: float  # bytes per second

    def ids(self, sequences: int, length: int, seed: int) -> list[list[int]]:
        table: list[list[int]] = (
            np.random.default_rng(seed).integers(0, self.scale.config.vocab_size, (sequences, length)).tolist()
        )
        return table

    @property
    def parameters(self) -> str:
        return f"{sum(p.numel() for p in self.theirs.parameters()) / 1e6:.0f} M parameters"


@pytest.fixture(scope="module")
def subject(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    logging.disable_progress_bar()
    scale = SCALES[device.type]
    dtype = scale.config.dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)))
    try:
        with device:
            theirs = Qwen3ForCausalLM(scale.config).eval()
    finally:
        torch.set_default_dtype(before)
    path = tmp_path_factory.mktemp("speed") / "model"
    theirs.save_pretrained(path)
    return Subject(scale, device, theirs, path, copy_bandwidth(device, scale.copied))


@pytest.fixture(scope="module")
def engine(subject: Subject) -> Engine:
    """Returns our engine, with room for all sequences of these tests and the step size of a server."""
    settings = {
        "test_block_num": 0,
        "kv_cache_mem_mb": 8192 if subject.device.type == "cuda" else 256,
        "max_batch_tokens_size": 0,
        "warm_up": True,
    }
    return drive.make_engine(load(subject, settings), lambda step: None)


def load(subject: Subject, settings: drive.Settings) -> ModelRunner:
    context = subject.scale.config.max_position_embeddings
    return drive.load_runner(subject.path, settings, SingleRankGroup(), subject.device, context)[0]


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Returns the bytes per second, read and written, of the fastest of several copies."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(device, lambda: target.copy_(source)) for _ in range(2 * REPEATS))


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_decode(subject: Subject, engine: Engine, note: Note, sequences: int) -> None:
    steps, floor = ours_decode(subject, engine, sequences)
    ours, theirs = statistics.median(steps), theirs_decode(subject, sequences)
    note("reason", f"{ours * 1e3:.2f} ms a step, {max(steps) * 1e3:.2f} the slowest; {subject.parameters}")
    note(
        "speed", row(f"decode step, {sequences} sequences", "ms", ours * 1e3, theirs * 1e3, theirs / ours, floor * 1e3)
    )


def row(what: str, unit: str, ours: float, theirs: float, ratio: float, floor: float | None = None) -> dict[str, Any]:
    """`ratio`: our speed divided by that of transformers. `floor`: the bytes to read divided by the bandwidth."""
    return {"what": what, "unit": unit, "ours": ours, "transformers": theirs, "ratio": ratio, "floor": floor}


def ours_decode(subject: Subject, engine: Engine, sequences: int) -> tuple[list[float], float]:
    """Returns the seconds of each step, and the floor of a step."""
    requests = [
        drive.greedy_request(ids, ENDLESS, id=str(i))
        for i, ids in enumerate(subject.ids(sequences, PROMPT, seed=sequences))
    ]
    for request in requests:
        engine.add(request)
    while any(request.num_output_tokens == 0 for request in requests):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    cost = runner_of(engine).cost
    before = cost.read_bytes
    times = [seconds(subject.device, engine.step) for _ in range(subject.scale.steps)]
    read = (cost.read_bytes - before) / len(times)
    assert engine.last_step_tokens == sequences
    for request in requests:
        engine.abort(request.id)
    return times, read / subject.bandwidth


def runner_of(engine: Engine) -> ModelRunner:
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


@torch.inference_mode()
def theirs_decode(subject: Subject, sequences: int) -> float:
    """Returns the seconds of a step: a long generation minus one of a single token."""
    table = subject.ids(sequences, PROMPT, seed=sequences)
    generate(subject, table, 2)
    count = subject.scale.steps
    return (best_generate(subject, table, 1 + count) - best_generate(subject, table, 1)) / count


def best_generate(subject: Subject, table: list[list[int]], count: int) -> float:
    return min(seconds(subject.device, lambda: generate(subject, table, count)) for _ in range(REPEATS))


def generate(subject: Subject, table: list[list[int]], count: int) -> None:
    ids = torch.tensor(table, device=subject.device)
    kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    subject.theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, **kwargs)  # type: ignore[operator]


def test_prefill(subject: Subject, engine: Engine, note: Note) -> None:
    length = subject.scale.long_prompt
    ours = length / min(ours_prefill(subject, engine, seed) for seed in range(REPEATS + 1))
    theirs = length / theirs_prefill(subject)
    note("reason", f"{ours:.0f} tokens/s, a prompt of {length} tokens")
    note("speed", row(f"prefill, {length} tokens", "tokens/s", ours, theirs, ours / theirs))


def ours_prefill(subject: Subject, engine: Engine, seed: int) -> float:
    """Returns seconds. Each seed gives another prompt, so that the prefix cache has no hits."""
    request = drive.greedy_request(subject.ids(1, subject.scale.long_prompt, 100 + seed)[0], 1)
    engine.add(request)
    return seconds(subject.device, lambda: drive.finish(engine, {"0": drive.Completion()}))


@torch.inference_mode()
def theirs_prefill(subject: Subject) -> float:
    table = subject.ids(1, subject.scale.long_prompt, seed=100)
    generate(subject, table, 1)
    return best_generate(subject, table, 1)


def test_bandwidth(subject: Subject, note: Note) -> None:
    """Reports the bandwidth that the floors are computed with."""
    note("reason", f"{subject.bandwidth / 1e9:.0f} GB/s copied, read and written; {subject.parameters}")


def test_a_full_cache_leaves_room_to_forward(subject: Subject, engine: Engine, note: Note) -> None:
    """The KV cache takes the memory that a warm-up with one prompt leaves free. With sequences that fill this cache, a
    decode step and a prefill chunk must still fit into memory.
    """
    forget(subject, engine)
    small = {} if subject.device.type == "cuda" else {"kv_cache_mem_mb": 64}
    runner = load(subject, {"test_block_num": 0, "max_batch_tokens_size": 0, "warm_up": True} | small)
    sequences = runner.config.max_sequences
    blocks = min(runner.num_blocks // sequences, runner.max_seq_len // runner.block_size)
    note("reason", f"{runner.kv_bytes / MIB:.0f} MiB of KV cache; {sequences} sequences of {blocks} blocks")
    assert runner._forward(last_tokens(runner, sequences, blocks, each=1)) is not None
    longest = min(runner.num_blocks, runner.max_seq_len // runner.block_size)
    chunk = min(runner.max_num_batched_tokens, longest * runner.block_size)
    assert runner._forward(last_tokens(runner, 1, longest, each=chunk)) is not None
    wait(subject.device)


def forget(subject: Subject, engine: Engine) -> None:
    """Frees the device memory that the other tests of this process hold."""
    runner_of(engine).kv_caches = []
    torch.nn.Module.to(subject.theirs, "meta")
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()


def last_tokens(runner: ModelRunner, sequences: int, blocks: int, each: int) -> Step:
    """Returns a step with the last `each` tokens of each sequence. The cache content before them is arbitrary."""
    length = blocks * runner.block_size
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
    positions = np.tile(np.arange(length - each, length, dtype=np.int32), sequences)
    first = np.repeat(tables[:, 0] * runner.block_size, each).astype(np.int32)
    return Step(
        0,
        0,
        sequences if each == 1 else 0,
        token_ids=np.zeros_like(positions),
        positions=positions,
        slot_mapping=first + positions,
        query_start_loc=np.arange(0, len(positions) + 1, each, dtype=np.int32),
        seq_lens=np.full(sequences, length, dtype=np.int32),
        prompt_lens=np.full(sequences, length, dtype=np.int32),
        block_tables=tables,
        logits_indices=np.arange(each - 1, len(positions), each, dtype=np.int32),
    )
