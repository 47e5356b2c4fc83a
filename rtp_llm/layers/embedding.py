"""Vocabulary-parallel embedding and output head. The embedding is summed over ranks; logits are gathered on rank 0."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rtp_llm.kernels.prepacked import linear
from rtp_llm.layers.linear import PrepackedLinear
from rtp_llm.layers.parameter import ShardedParameter, WeightSlice, sharded_parameter
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import padded_vocab, shard_vocab


def vocab_parameter(name: str, vocab_size: int, hidden_size: int, group: Group) -> ShardedParameter:
    """Returns the parameter for this rank's rows of the checkpoint tensor `name`.

    Its shape is [padded_vocab / number of ranks, hidden_size]; padding rows are zero.
    """
    shard = shard_vocab(vocab_size, group.size, group.rank)
    num_rows = padded_vocab(vocab_size, group.size) // group.size
    weight_slice = WeightSlice(name, 0, shard, range(len(shard)))
    return sharded_parameter((num_rows, hidden_size), [weight_slice], {name: (vocab_size, hidden_size)})


class VocabParallelEmbedding(nn.Module):
    """Embedding of token ids, sharded by vocabulary.

    Each rank looks up the tokens of its shard and has zeros for the others; an all-reduce sums over the ranks.
    """

    def __init__(self, vocab_size: int, hidden_size: int, group: Group):
        super().__init__()
        self.group = group
        self.weight = vocab_parameter("model.embed_tokens.weight", vocab_size, hidden_size, group)
        self.vocab_start = group.rank * len(self.weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens] int64. Returns [num_tokens, hidden_size], equal on all ranks."""
        if self.group.size == 1:
            return embedding(token_ids, self.weight)
        local_ids = token_ids - self.vocab_start
        outside_shard = (local_ids < 0) | (local_ids >= len(self.weight))
        rows = embedding(local_ids.masked_fill(outside_shard, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(outside_shard[:, None], 0))


class ParallelLMHead(PrepackedLinear):
    """Output head. `tied_weight`: the embedding's parameter if the checkpoint uses it for the head too, else None."""

    def __init__(self, vocab_size: int, hidden_size: int, group: Group, tied_weight: ShardedParameter | None):
        super().__init__()
        self.group, self.vocab_size = group, vocab_size
        self.weight = (
            tied_weight
            if tied_weight is not None
            else vocab_parameter("lm_head.weight", vocab_size, hidden_size, group)
        )

    def forward(self, hidden: Tensor) -> Tensor | None:
        """Returns logits [num_rows, vocab_size] float32 on rank 0, None on the other ranks.

        hidden: [num_rows, hidden_size].
        """
        shards = self.group.gather(linear(hidden, self.weight, prepacked=self.prepacked))
        if shards is None:
            return None
        return torch.cat(shards, dim=-1)[:, : self.vocab_size].float()
