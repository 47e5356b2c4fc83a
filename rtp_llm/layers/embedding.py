"""Vocabulary-parallel embedding and output head. The embedding is summed over ranks; logits are gathered on rank 0."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rtp_llm.kernels.linear_method import Weights
from rtp_llm.layers.linear import ParallelLinear
from rtp_llm.layers.parameter import WeightSlice, sharded_parameter
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import padded_vocab, shard_vocab


def _vocab_slice(name: str, vocab_size: int, hidden_size: int, group: Group) -> tuple[int, WeightSlice]:
    """Returns the number of rows of this rank, padding included, and the slice of the checkpoint that they hold."""
    shard, columns = shard_vocab(vocab_size, group.size, group.rank), range(hidden_size)
    num_rows = padded_vocab(vocab_size, group.size) // group.size
    return num_rows, WeightSlice(name, (shard, columns), (range(len(shard)), columns))


class VocabParallelEmbedding(nn.Module):
    """Embedding of token ids. Each rank looks up tokens of its vocabulary shard; an all-reduce sums the results."""

    def __init__(self, vocab_size: int, hidden_size: int, group: Group):
        super().__init__()
        self.group = group
        num_rows, rows = _vocab_slice("model.embed_tokens.weight", vocab_size, hidden_size, group)
        self.weight = sharded_parameter((num_rows, hidden_size), [rows], {rows.name: (vocab_size, hidden_size)})
        self.vocab_start = group.rank * num_rows

    def forward(self, token_ids: Tensor) -> Tensor:
        """Returns the embeddings [num_tokens, hidden_size], equal on all ranks. token_ids: [num_tokens] int64."""
        if self.group.size == 1:
            return embedding(token_ids, self.weight)
        local_ids = token_ids - self.vocab_start
        outside_shard = (local_ids < 0) | (local_ids >= len(self.weight))
        rows = embedding(local_ids.masked_fill(outside_shard, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(outside_shard[:, None], 0))


class ParallelLMHead(ParallelLinear):
    """Output head, sharded over the vocabulary: computes logits from hidden states.

    `tied`: the embedding whose weights the head shares (`tie_word_embeddings`), otherwise None. The embedding's weights
    must then be loaded before `process_weights_after_loading` of the head.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        group: Group,
        tied: VocabParallelEmbedding | None,
        linear_method: str = "",
    ):
        num_rows, rows = _vocab_slice("lm_head", vocab_size, hidden_size, group)
        full_sizes = {rows.name: (vocab_size, hidden_size)}
        super().__init__(num_rows, hidden_size, [rows], full_sizes, None, linear_method, output_dtype=torch.float32)
        self.group, self.vocab_size, self.tied = group, vocab_size, tied
        if tied is not None:
            del self.weight

    def _loaded_weights(self) -> Weights:
        return super()._loaded_weights() if self.tied is None else {"weight": self.tied.weight}

    def forward(self, x: Tensor) -> Tensor | None:  # type: ignore[override]
        """Returns logits [num_rows, vocab_size] float32 on rank 0, None on the other ranks.

        x: hidden states [num_rows, hidden_size].
        """
        shards = self.group.gather(super().forward(x))
        if shards is None:
            return None
        logits = shards[0] if len(shards) == 1 else torch.cat(shards, dim=-1)
        return logits[:, : self.vocab_size]
