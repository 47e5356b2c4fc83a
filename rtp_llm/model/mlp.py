"""Feed-forward layers."""

from torch import Tensor, nn

from rtp_llm.kernels.linear_methods import shard_granularity
from rtp_llm.layers.linear import ColumnParallelLinear, RowParallelLinear, merged_columns
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import shard_mlp


class GatedMLP(nn.Module):
    """Feed-forward network down(silu(gate(x)) * up(x)), with this rank's shard of the three matrices."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group):
        super().__init__()
        prefix, full_size = f"model.layers.{layer}.mlp", spec.intermediate_size
        granularity = shard_granularity(spec.linear_method)
        shard = shard_mlp(full_size, group.size, group.rank, granularity)
        columns = merged_columns([f"{prefix}.gate_proj", f"{prefix}.up_proj"], full_size, shard)
        self.gate_up_proj = ColumnParallelLinear(
            spec.hidden_size, 2 * len(shard), columns, spec.mlp_bias, spec.linear_method, gated=True
        )
        self.down_proj = RowParallelLinear(
            f"{prefix}.down_proj",
            full_size,
            len(shard),
            spec.hidden_size,
            [(shard, range(len(shard)))],
            spec.mlp_bias and group.rank == 0,
            spec.linear_method,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns this rank's partial result, [num_tokens, hidden_size]; the sum over all ranks is the output. x: the
        input, of the same shape, equal on all ranks.
        """
        return self.down_proj(self.gate_up_proj(x))
