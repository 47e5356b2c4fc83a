"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), added by this file alone.

The cache keeps one latent per token, the same on all ranks, from which keys and values are projections. The layer folds
the projections into the query and the output, so for the backend the latent is the key and the value of one KV head.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from rtp_llm.contract.kv_cache import KVCacheGroup, KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionBackend, AttentionParams
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import LayerKVCache
from rtp_llm.kernels.torch_ops import apply_rotary_emb
from rtp_llm.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.layers.norm import RMSNorm
from rtp_llm.layers.parameter import WeightSlice, sharded_parameter
from rtp_llm.layers.rope import RotaryEmbedding
from rtp_llm.model import decoder, kv_cache_specs, spec
from rtp_llm.model.forward_context import ForwardContext
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import shard_heads
from tests.model import checkpoints, drive
from tests.model.checkpoints import CheckpointCase
from tests.model.oracle import make_oracle
from tests.quick import slow_except
from tests.seams.thread_ranks import thread_ranks

RANK, NOPE, ROPE, VALUE = 16, 12, 8, 20  # sizes: latent, a head's query without and with rope, a head's value
CONFIG: spec.Json = {
    "num_key_value_heads": 6,
    "kv_lora_rank": RANK,
    "q_lora_rank": None,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "first_k_dense_replace": 2,  # no experts
}
NORM_EPS = 1e-6  # of the latent's norm, whatever rms_norm_eps is


class LatentAttention(nn.Module):
    """Attention over the latents of all tokens, for this rank's query heads."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group, backend: AttentionBackend):
        super().__init__()
        prefix, total = f"model.layers.{layer}.self_attn", spec.num_heads
        heads = shard_heads(total, total, group.size, group.rank).kv_heads
        self.layer, self.backend, self.params = layer, backend, AttentionParams(scale=(NOPE + ROPE) ** -0.5)
        self.rope = RotaryEmbedding(spec.rope, ROPE, torch.device("cpu"), torch.get_default_dtype())

        def rows(size: int) -> tuple[range, range]:  # of this rank's heads, in the checkpoint and in the parameter
            return range(heads[0] * size, (heads[-1] + 1) * size), range(len(heads) * size)

        self.num_heads = len(heads)
        self.q_proj = ColumnParallelLinear(
            spec.hidden_size,
            len(heads) * (NOPE + ROPE),
            [(f"{prefix}.q_proj", total * (NOPE + ROPE), [rows(NOPE + ROPE)])],
            bias=False,
        )
        whole = range(RANK + ROPE)
        self.kv_a_proj = ColumnParallelLinear(
            spec.hidden_size, len(whole), [(f"{prefix}.kv_a_proj_with_mqa", len(whole), [(whole, whole)])], bias=False
        )
        self.kv_a_layernorm = RMSNorm(f"{prefix}.kv_a_layernorm", RANK, NORM_EPS)
        name, (source, target) = f"{prefix}.kv_b_proj.weight", rows(NOPE + VALUE)
        self.kv_b_weight = sharded_parameter(
            (len(target), RANK),
            [WeightSlice(name, (source, range(RANK)), (target, range(RANK)))],
            {name: (total * (NOPE + VALUE), RANK)},
        )
        self.o_proj = RowParallelLinear(
            f"{prefix}.o_proj", total * VALUE, len(heads) * VALUE, spec.hidden_size, [rows(VALUE)], bias=False
        )

    def workspace_bytes(self, group: KVCacheGroup, max_tokens: int, max_seq_len: int) -> int:
        return 1 << 20

    def prepare(self, batch: ForwardBatch, index: int, group: KVCacheGroup) -> Any:
        return self.backend.prepare(batch, index, group.spec, group.block_size)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        cos_sin = context.cos_sin(self.rope)
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).split((NOPE, ROPE), -1)
        latent, k_rope = self.kv_a_proj(x)[:, None].split((RANK, ROPE), -1)
        key_weight, value_weight = self.kv_b_weight.unflatten(0, (self.num_heads, -1)).split((NOPE, VALUE), 1)
        query = torch.einsum("thn,hnr->thr", q_nope, key_weight)
        query = torch.cat((query, apply_rotary_emb(pair_halves(q_rope), *cos_sin)), -1)
        entry = torch.cat((self.kv_a_layernorm(latent), apply_rotary_emb(pair_halves(k_rope), *cos_sin)), -1)
        latents = context.caches[self.layer]["latent"]
        cache = LayerKVCache({"keys": latents, "values": latents})
        out = self.backend.forward(self.params, query, entry, entry, cache, context.metadata_of(self.layer))
        return self.o_proj(torch.einsum("thr,hvr->thv", out[..., :RANK], value_weight).flatten(1))


def pair_halves(x: Tensor) -> Tensor:
    """Returns the elements (2 i, 2 i + 1), which DeepSeek's rope rotates together, at i and i + size / 2."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def latent_spec(spec: ModelSpec, layer: int, tp_size: int, tp_rank: int) -> KVCacheSpec:
    return KVCacheSpec((("latent", (1, RANK + ROPE)),), spec.dtype, replicated=True)


@pytest.mark.parametrize(
    ("tp_size", "settings"), slow_except([(1, {}), (1, {"max_batch_tokens_size": 7}), (2, {})], (2, {})), ids=str
)
def test_same_tokens_and_logits(
    tp_size: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(spec.FAMILIES, "deepseek_v3", lambda config: {"attention": ("mla",) * 2})
    monkeypatch.setitem(spec.ARCHITECTURES, "DeepseekV3ForCausalLM", "deepseek_v3")
    monkeypatch.setitem(decoder.ATTENTIONS, "mla", LatentAttention)
    monkeypatch.setitem(kv_cache_specs.KV_CACHE_SPECS, "mla", latent_spec)
    monkeypatch.setitem(checkpoints.FAMILIES, "deepseek_v3", (DeepseekV3Config, DeepseekV3ForCausalLM))
    torch.set_num_threads(1)
    oracle = make_oracle(CheckpointCase("deepseek_v3", "deepseek_v3", CONFIG), tmp_path)
    with thread_ranks(oracle.path, tp_size, **settings) as (engine, ranks):
        oracle.check(drive.run(engine, oracle.greedy_requests()))
        again = drive.run(engine, oracle.greedy_requests())
        oracle.check(again)
        assert max(completion.cached_tokens for completion in again.values()) > 0
        for runner, _ in ranks:
            layout = runner.residency.layout
            assert layout.block_bytes == 2 * 16 * (RANK + ROPE) * 4  # layers, tokens, elements, bytes
