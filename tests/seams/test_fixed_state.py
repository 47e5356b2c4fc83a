"""A layer with a fixed state per sequence, a gated linear recurrence between two attention layers, added by this file
alone. transformers' Llama gets the same layer as a plain loop.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM

from rtp_llm.contract.kv_cache import KVCacheGroup, KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionBackend
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.layers.linear import ColumnParallelLinear, RowParallelLinear, merged_columns
from rtp_llm.model import decoder, kv_cache_specs, spec
from rtp_llm.model.forward_context import ForwardContext
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.group import Group
from tests.model import checkpoints, drive
from tests.model.checkpoints import SIZES, CheckpointCase
from tests.model.oracle import make_oracle
from tests.seams.thread_ranks import thread_ranks

WIDTH = SIZES["hidden_size"]  # channels of the state
KINDS = ("gqa", "recurrence", "gqa")
NAMES = ("decay_proj", "input_proj", "gate_proj")


class PlainRecurrence(nn.Module):
    """state = a state + (1 - a) input with a = sigmoid(decay); output = out_proj(state silu(gate)), token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.decay_proj, self.input_proj, self.gate_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.state = torch.zeros(WIDTH)

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        if position_ids[0, 0] == 0:
            self.state = torch.zeros(WIDTH)
        outputs = []
        for x in hidden_states[0]:
            decay = self.decay_proj(x).sigmoid()
            self.state = decay * self.state + (1 - decay) * self.input_proj(x)
            outputs.append(self.o_proj(self.state * silu(self.gate_proj(x))))
        return torch.stack(outputs)[None], None


class RecurrentForCausalLM(LlamaForCausalLM):
    """Llama whose second layer has the recurrence in place of attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.layers[1].self_attn = PlainRecurrence()


class Recurrence(nn.Module):
    """The recurrence over this rank's channels; a sequence's state is in its block of the layer's KV cache."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group, backend: AttentionBackend):
        super().__init__()
        prefix, size = f"model.layers.{layer}.self_attn", WIDTH // group.size
        shard = range(group.rank * size, (group.rank + 1) * size)
        columns = merged_columns([f"{prefix}.{name}" for name in NAMES], WIDTH, shard)
        self.layer = layer
        self.in_proj = ColumnParallelLinear(spec.hidden_size, len(NAMES) * size, columns, bias=False)
        self.o_proj = RowParallelLinear(
            f"{prefix}.o_proj", WIDTH, size, spec.hidden_size, [(shard, range(size))], bias=False
        )

    def workspace_bytes(self, group: KVCacheGroup, max_tokens: int, max_seq_len: int) -> int:
        return 1 << 20

    def prepare(self, batch: ForwardBatch, index: int, group: KVCacheGroup) -> list[tuple[Tensor, slice, bool]]:
        """Returns (block, tokens, whether they are the first) of each sequence."""
        bounds, lengths = batch.host_query_start_loc.tolist(), batch.host_seq_lens.tolist()
        return [
            (block, slice(start, end), length == end - start)
            for block, start, end, length in zip(batch.slot_mapping[index], bounds, bounds[1:], lengths, strict=False)
        ]

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        states = context.caches[self.layer]["state"]
        decay, inputs, gate = self.in_proj(x).chunk(3, dim=-1)
        decay, out = decay.sigmoid(), torch.empty_like(inputs)
        for block, tokens, is_first in context.metadata_of(self.layer):
            state = torch.zeros_like(states[block]) if is_first else states[block]
            for index in range(tokens.start, tokens.stop):
                state = decay[index] * state + (1 - decay[index]) * inputs[index]
                out[index] = state
            states[block] = state
        return self.o_proj(out * silu(gate))


def recurrence_spec(spec: ModelSpec, layer: int, tp_size: int, tp_rank: int) -> KVCacheSpec:
    return KVCacheSpec((("state", (WIDTH // tp_size,)),), "fp32", per_sequence=True)


@pytest.mark.parametrize(
    ("tp_size", "settings"),
    [
        pytest.param(1, {"test_block_num": 80}, marks=pytest.mark.slow),
        pytest.param(1, {"test_block_num": 80, "max_batch_tokens_size": 7}, marks=pytest.mark.slow),
        (1, {"test_block_num": 16}),  # preempted sequences start again from no state
        (2, {"test_block_num": 80}),
    ],
    ids=str,
)
def test_same_tokens_and_logits(
    tp_size: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(spec.FAMILIES, "recurrent", lambda config: {"attention": KINDS})
    monkeypatch.setitem(spec.ARCHITECTURES, "RecurrentForCausalLM", "recurrent")
    monkeypatch.setitem(decoder.ATTENTIONS, "recurrence", Recurrence)
    monkeypatch.setitem(kv_cache_specs.KV_CACHE_SPECS, "recurrence", recurrence_spec)
    monkeypatch.setitem(checkpoints.FAMILIES, "recurrent", (LlamaConfig, RecurrentForCausalLM))
    torch.set_num_threads(1)
    case = CheckpointCase("recurrent", "recurrent", {"num_hidden_layers": len(KINDS)})
    oracle = make_oracle(case, tmp_path)
    with thread_ranks(oracle.path, tp_size, **settings) as (engine, ranks):
        oracle.check(drive.run(engine, oracle.greedy_requests()))
        oracle.check(drive.run(engine, oracle.greedy_requests()))  # in blocks that hold the states of others
        for runner, _ in ranks:
            attention, recurrence = runner.residency.layout.groups
            assert (attention.layers, recurrence.layers) == ((0, 2), (1,))
            assert (recurrence.block_size, recurrence.spec.num_bytes) == (0, 4 * WIDTH // tp_size)
        if settings["test_block_num"] == 16:
            assert engine.scheduler.stats.preemptions > 0
