"""The linear layer with prepacked weights compared with torch's linear, and weights that are not prepacked."""

import pytest
import torch

from rtp_llm.kernels import prepacked as kernel
from rtp_llm.layers.linear import ColumnParallelLinear, PrepackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1024, 1024), (1031, 1027), (4096, 257)])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_prepacked_matches_torch(dtype: torch.dtype, shape: tuple[int, int], rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    b = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    with torch.inference_mode():
        prepacked = kernel.prepack_weight(weight)
        if prepacked is None:
            pytest.skip(f"this CPU does not support prepacked {dtype}")
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        result = kernel.linear(x, weight, b, prepacked).double()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.2}[dtype]  # values reach 150
    assert (result - exact).abs().max() < tolerance


def test_small_weights_are_not_prepacked() -> None:
    assert kernel.prepack_weight(torch.randn(64, 64)) is None


def test_prepacking_frees_the_original_weight_unless_it_is_shared() -> None:
    def make_layer() -> PrepackedLinear:
        layer = ColumnParallelLinear(1024, 1024, [("w", 1024, [(range(1024), range(1024))])], bias=False)
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        return layer

    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        plain, unshared, shared = make_layer(), make_layer(), make_layer()
        unshared.prepack()
        shared.prepack(shared=True)
        assert torch.allclose(plain(x), unshared(x), atol=1e-3)
        assert torch.allclose(plain(x), shared(x), atol=1e-3)
    assert unshared.weight.numel() == 0
    assert shared.weight.numel() == 1024 * 1024
