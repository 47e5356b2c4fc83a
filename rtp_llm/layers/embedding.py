"""Vocabulary cut over the tensor-parallel group: the embedding sums its shares, the head gathers its logits on rank
0.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rtp_llm.kernels.prepacked import linear
from rtp_llm.layers.linear import PrepackedLinear
from rtp_llm.layers.parameter import ShardedParameter, WeightSlice, sharded_parameter
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import padded_vocab, shard_vocab


def vocab_parameter(name: str, vocab_size: int, hidden_size: int, group: Group) -> ShardedParameter:
    """[padded vocabulary / ranks, hidden]: this rank's rows, zeros where the vocabulary has ended."""
    share = shard_vocab(vocab_size, group.size, group.rank)
    rows = padded_vocab(vocab_size, group.size) // group.size
    piece = WeightSlice(name, 0, share, range(len(share)))
    return sharded_parameter((rows, hidden_size), [piece], {name: (vocab_size, hidden_size)})


class VocabParallelEmbedding(nn.Module):
    """ids [T] to [T, hidden]; each rank looks up its own rows, the others count as zero."""

    def __init__(self, vocab_size: int, hidden_size: int, group: Group):
        super().__init__()
        self.group = group
        self.weight = vocab_parameter("model.embed_tokens.weight", vocab_size, hidden_size, group)
        self.first = group.rank * len(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return embedding(ids, self.weight)
        local = ids - self.first
        foreign = (local < 0) | (local >= len(self.weight))
        rows = embedding(local.masked_fill(foreign, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(foreign[:, None], 0))


class ParallelLMHead(PrepackedLinear):
    """Hidden states [R, hidden] to logits [R, vocab] in float32 on rank 0, None on the others."""

    def __init__(self, vocab_size: int, hidden_size: int, group: Group, tied: ShardedParameter | None):
        super().__init__()
        self.group, self.vocab_size = group, vocab_size
        self.weight = tied if tied is not None else vocab_parameter("lm_head.weight", vocab_size, hidden_size, group)

    def forward(self, hidden: Tensor) -> Tensor | None:
        parts = self.group.gather(linear(hidden, self.weight, prepacked=self.prepacked))
        if parts is None:
            return None
        return torch.cat(parts, dim=-1)[:, : self.vocab_size].float()
