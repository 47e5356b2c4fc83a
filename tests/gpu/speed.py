"""Measures the speed of a model of realistic size: ours, that of transformers, and the limit by memory bandwidth.

The tests report speeds and do not assert them. The weights are random, which does not change the cost.
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
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from rtp_llm.engine.engine import Engine
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.residency import Residency
from tests.gpu.plugin import Note
from tests.model import drive
from tests.model.conftest import _one_thread  # noqa: F401  # applies to these tests, too

MIB = 1 << 20
MAX_POSITIONS = 40960
# The dimensions of Qwen3-0.6B.
QWEN3_0_6B = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=MAX_POSITIONS,
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
PROMPT_TOKENS = 128  # tokens of each sequence before decoding is timed
UNREACHED_MAX_TOKENS = 10_000  # tokens; the test aborts the request earlier
WARM_UP_STEPS = 4
REPEATS = 3


@dataclass(frozen=True)
class BenchmarkConfig:
    """Model and sizes that the tests measure on one type of device."""

    model_config: Qwen3Config
    num_steps: int
    long_prompt_tokens: int
    copy_bytes: int  # to measure the memory bandwidth


BENCHMARK_CONFIGS = {
    "cuda": BenchmarkConfig(QWEN3_0_6B, num_steps=32, long_prompt_tokens=4096, copy_bytes=1024 * MIB),
    "cpu": BenchmarkConfig(TINY, num_steps=16, long_prompt_tokens=512, copy_bytes=128 * MIB),
}


@dataclass(frozen=True)
class BenchmarkModel:
    """A model of transformers in memory, and its checkpoint on disk."""

    benchmark: BenchmarkConfig
    device: torch.device
    reference: PreTrainedModel
    path: Path
    bandwidth: float  # bytes per second

    def random_prompts(self, sequences: int, length: int, seed: int) -> list[list[int]]:
        """Returns random token ids, [sequences, length]."""
        generator = np.random.default_rng(seed)
        vocab_size = self.benchmark.model_config.vocab_size
        prompts: list[list[int]] = generator.integers(0, vocab_size, (sequences, length)).tolist()
        return prompts

    @property
    def parameters(self) -> str:
        return f"{sum(p.numel() for p in self.reference.parameters()) / 1e6:.0f} M parameters"


@pytest.fixture(scope="module")
def model(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkModel:
    logging.disable_progress_bar()
    benchmark = BENCHMARK_CONFIGS[device.type]
    dtype = benchmark.model_config.dtype
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)))
    try:
        with device:
            reference = Qwen3ForCausalLM(benchmark.model_config).eval()
    finally:
        torch.set_default_dtype(default_dtype)
    path = tmp_path_factory.mktemp("speed") / "model"
    reference.save_pretrained(path)
    return BenchmarkModel(benchmark, device, reference, path, measure_copy_bandwidth(device, benchmark.copy_bytes))


@pytest.fixture(scope="module")
def residency(model: BenchmarkModel) -> Residency:
    """Returns weights and a KV cache for all sequences of these tests, with the step size of a server."""
    settings = {
        "test_block_num": 0,
        "kv_cache_mem_mb": 8192 if model.device.type == "cuda" else 256,
        "max_batch_tokens_size": 0,
        "warm_up": True,
    }
    return load_residency(model, settings)


def load_residency(model: BenchmarkModel, settings: drive.Settings) -> Residency:
    context = model.benchmark.model_config.max_position_embeddings
    return drive.load_runner(model.path, settings, SingleRankGroup(), model.device, context)[0].residency


def make_engine(residency: Residency, pipeline_depth: int = 0) -> Engine:
    """Returns an engine with an empty prefix cache."""
    residency.config = residency.config.model_copy(update={"rtp_pipeline_depth": pipeline_depth})
    return drive.make_engine(ModelRunner(residency))


def measure_copy_bandwidth(device: torch.device, size: int) -> float:
    """Returns the bytes per second, read and written, of the fastest of several copies."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(measure_seconds(device, lambda: target.copy_(source)) for _ in range(2 * REPEATS))


def measure_seconds(device: torch.device, operation: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    operation()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_decode(model: BenchmarkModel, residency: Residency, note: Note, sequences: int) -> None:
    theirs = measure_reference_decode(model, sequences)
    for pipeline_depth in (0, 1):
        steps, floor = measure_decode(model, make_engine(residency, pipeline_depth), sequences)
        ours = statistics.median(steps)
        note("reason", f"depth {pipeline_depth}: {ours * 1e3:.2f} ms per step, slowest {max(steps) * 1e3:.2f}")
        name = f"decode step, {sequences} sequences, depth {pipeline_depth}"
        note("speed", speed_row(name, "ms", ours * 1e3, theirs * 1e3, theirs / ours, floor * 1e3))


def speed_row(
    name: str, unit: str, ours: float, theirs: float, ratio: float, floor: float | None = None
) -> dict[str, Any]:
    """Returns a row of the speed table.

    `ratio`: our speed divided by that of transformers. `floor`: the least possible time, i.e. the bytes to read
    divided by the memory bandwidth.
    """
    return {"name": name, "unit": unit, "ours": ours, "transformers": theirs, "ratio": ratio, "floor": floor}


def measure_decode(model: BenchmarkModel, engine: Engine, sequences: int) -> tuple[list[float], float]:
    """Returns the seconds of each decode step, and its floor: the seconds that reading the step's bytes takes at full
    memory bandwidth."""
    requests = [
        drive.greedy_request(ids, UNREACHED_MAX_TOKENS, id=str(i))
        for i, ids in enumerate(model.random_prompts(sequences, PROMPT_TOKENS, seed=sequences))
    ]
    for request in requests:
        engine.add(request)
    while any(request.num_output_tokens == 0 for request in requests):
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    cost = get_runner(engine).cost
    initial_read_bytes = cost.read_bytes
    times = [measure_seconds(model.device, engine.step) for _ in range(model.benchmark.num_steps)]
    bytes_per_step = (cost.read_bytes - initial_read_bytes) / len(times)
    assert engine.last_step_tokens == sequences
    for request in requests:
        engine.abort(request.id)
    while engine.has_work:  # a step may still be computed
        engine.step()
    return times, bytes_per_step / model.bandwidth


def get_runner(engine: Engine) -> ModelRunner:
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


@torch.inference_mode()
def measure_reference_decode(model: BenchmarkModel, sequences: int) -> float:
    """Returns the seconds per decode step of transformers: (time of a long generation - time of a generation of one
    token) / further tokens."""
    prompts = model.random_prompts(sequences, PROMPT_TOKENS, seed=sequences)
    generate(model, prompts, 2)
    num_steps = model.benchmark.num_steps
    return (measure_generate(model, prompts, 1 + num_steps) - measure_generate(model, prompts, 1)) / num_steps


def measure_generate(model: BenchmarkModel, prompts: list[list[int]], num_tokens: int) -> float:
    return min(measure_seconds(model.device, lambda: generate(model, prompts, num_tokens)) for _ in range(REPEATS))


def generate(model: BenchmarkModel, prompts: list[list[int]], num_tokens: int) -> None:
    ids = torch.tensor(prompts, device=model.device)
    kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    model.reference.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **kwargs)  # type: ignore[operator]


def test_prefill(model: BenchmarkModel, residency: Residency, note: Note) -> None:
    length, engine = model.benchmark.long_prompt_tokens, make_engine(residency)
    ours = length / min(measure_prefill(model, engine, seed) for seed in range(REPEATS + 1))
    theirs = length / measure_reference_prefill(model)
    note("reason", f"{ours:.0f} tokens/s for a prompt of {length} tokens")
    note("speed", speed_row(f"prefill, {length} tokens", "tokens/s", ours, theirs, ours / theirs))


def measure_prefill(model: BenchmarkModel, engine: Engine, seed: int) -> float:
    """Returns the seconds of one prefill. Each seed gives another prompt, so that the prefix cache has no hits."""
    request = drive.greedy_request(model.random_prompts(1, model.benchmark.long_prompt_tokens, 100 + seed)[0], 1)
    engine.add(request)
    return measure_seconds(model.device, lambda: drive.finish(engine, {"0": drive.Completion()}))


@torch.inference_mode()
def measure_reference_prefill(model: BenchmarkModel) -> float:
    prompts = model.random_prompts(1, model.benchmark.long_prompt_tokens, seed=100)
    generate(model, prompts, 1)
    return measure_generate(model, prompts, 1)


def test_bandwidth(model: BenchmarkModel, note: Note) -> None:
    """Reports the memory bandwidth from which the least possible times (floors) of the other tests are computed."""
    note("reason", f"{model.bandwidth / 1e9:.0f} GB/s copied, read and written; {model.parameters}")


def test_full_kv_cache_leaves_memory_for_forward(model: BenchmarkModel, residency: Residency, note: Note) -> None:
    """A decode step and a prefill chunk with sequences that fill the KV cache must still fit into memory.

    The KV cache takes the memory that a warm-up with one prompt leaves free.
    """
    free_device_memory(model, residency)
    cache_settings = {} if model.device.type == "cuda" else {"kv_cache_mem_mb": 64}
    full = load_residency(model, {"test_block_num": 0, "max_batch_tokens_size": 0, "warm_up": True} | cache_settings)
    sequences, (group,) = full.config.max_sequences, full.layout.groups
    blocks = min(full.num_blocks // sequences, full.max_seq_len // group.block_size)
    note("reason", f"{full.kv_bytes / MIB:.0f} MiB of KV cache; {sequences} sequences of {blocks} blocks")
    assert compute_logits(full, make_batch(full, sequences, blocks, num_tokens=1)) is not None
    max_blocks = min(full.num_blocks, full.max_seq_len // group.block_size)
    chunk = min(full.max_num_batched_tokens, max_blocks * group.block_size)
    assert compute_logits(full, make_batch(full, 1, max_blocks, num_tokens=chunk)) is not None
    synchronize(model.device)


def free_device_memory(model: BenchmarkModel, residency: Residency) -> None:
    """Frees the device memory that the fixtures of the other tests hold."""
    residency.kv_caches, residency.kv_memory = [], None
    torch.nn.Module.to(model.reference, "meta")
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def compute_logits(residency: Residency, batch: ForwardBatch) -> Tensor | None:
    """Returns the logits [sequences, vocab_size] of the last token of each sequence."""
    hidden = residency.forward(batch)
    logits: Tensor | None = residency.model.logits(hidden[batch.query_start_loc[1:] - 1])
    return logits


def make_batch(residency: Residency, sequences: int, blocks: int, num_tokens: int) -> ForwardBatch:
    """Returns the last `num_tokens` tokens of sequences that each fill `blocks` blocks.

    The cache content before them is arbitrary.
    """
    (group,) = residency.layout.groups
    seq_lens = np.full(sequences, blocks * group.block_size)
    return ForwardBatch.build(
        token_ids=np.zeros(sequences * num_tokens, np.int32),
        query_start_loc=num_tokens * np.arange(sequences + 1),
        seq_lens=seq_lens,
        prompt_lens=seq_lens,
        block_tables=[1 + np.arange(sequences * blocks).reshape(sequences, blocks)],  # all but the null block
        block_sizes=[group.block_size],
        device=residency.device,
    )
