"""Linear methods compared with float64 products; which method is selected; independence of a row from the others."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rtp_llm.errors import ConfigError
from rtp_llm.kernels.linear_method import Plain, Prepacked, WeightTensor
from rtp_llm.kernels.linear_methods import LINEAR_METHODS, select_linear_method
from rtp_llm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.layers.linear import ColumnParallelLinear, ParallelLinear
from rtp_llm.native.library import select_kernels
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.parallel.sharding import shard_mlp
from tests.quick import slow_except

CPU = torch.device("cpu")


@pytest.fixture
def without_kernels() -> Iterator[None]:
    """Lets torch compute."""
    select_kernels("off")
    yield
    select_kernels("auto")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def skip_unless_supported(dtype: torch.dtype) -> None:
    if not Prepacked.is_supported(dtype):
        pytest.skip(f"this CPU does not support prepacked {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1024, 1024), (1031, 1027), (4096, 257)])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_prepacked_matches_torch(dtype: torch.dtype, shape: tuple[int, int], rows: int, bias: bool) -> None:
    skip_unless_supported(dtype)
    weight, x = random_tensor(shape, dtype), random_tensor((rows, shape[1]), dtype, seed=1)
    b = random_tensor((shape[0],), dtype, seed=2) if bias else None
    method = Prepacked(*shape, dtype)
    with torch.inference_mode():
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        result = method.apply(x, method.transform({"weight": weight}), b).double()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.2}[dtype]  # values reach 150
    assert (result - exact).abs().max() < tolerance


@pytest.mark.parametrize("dtype", slow_except([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("shape", [(9728, 896), (896, 4864), (4096, 2048), (1152, 896), (192, 256)])
def test_rows_are_as_independent_as_measured(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A method that measured itself batch-invariant gives each row the same bits in any company.

    Not every CPU gets there: with AMX, oneDNN changes its kernel with the number of rows.
    """
    skip_unless_supported(dtype)
    method = Prepacked(*shape, dtype)
    x = random_tensor((512, shape[1]), dtype, seed=1)
    with torch.inference_mode():
        weights = method.transform({"weight": random_tensor(shape, dtype)})
        method.measure_batch_invariance(weights)
        y = method.apply(x, weights)
        differing = [
            (start, rows)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 16, 63, 64, 65, 128, 511)
            for start in {0, 512 - rows}
            if not torch.equal(method.apply(x[start : start + rows], weights), y[start : start + rows])
        ]
    if method.batch_invariant:
        assert differing == []
    elif "amx_bf16" not in cpu_flags():
        pytest.fail(f"rows differ without AMX: {differing}")


def cpu_flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        return next((set(line.split()) for line in file if line.startswith(("flags", "Features"))), set())


def test_a_method_whose_rows_depend_on_others_says_so() -> None:
    class Centered(Plain):
        """Adds the mean of all rows."""

        def apply(self, x: Tensor, weights: object, bias: Tensor | None = None) -> Tensor:
            return super().apply(x, weights, bias) + x.mean()  # type: ignore[arg-type]

    class RowByRow(Plain):
        """Multiplies one row at a time."""

        def apply(self, x: Tensor, weights: object, bias: Tensor | None = None) -> Tensor:
            rows = [super(RowByRow, self).apply(row, weights, bias) for row in x.split(1)]  # type: ignore[arg-type]
            return torch.cat(rows)

    for method, expected in ((Centered(64, 32, torch.float32), False), (RowByRow(64, 32, torch.float32), True)):
        method.measure_batch_invariance({"weight": random_tensor((64, 32))})
        assert method.batch_invariant is expected


@pytest.mark.usefixtures("without_kernels")
def test_small_weights_are_not_prepacked() -> None:
    assert select_linear_method("", 64, 64, torch.float32, CPU).name == "plain"
    assert select_linear_method("", 1024, 1024, torch.float32, CPU).name == "prepacked"
    assert select_linear_method("", 1024, 1024, torch.float32, torch.device("cuda")).name == "plain"
    assert select_linear_method("plain", 1024, 1024, torch.float32, CPU).name == "plain"


def load_random(layer: torch.nn.Module, seed: int) -> None:
    """Gives the layer random weights, as `model.weights` does with those of a checkpoint."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        loaded = parameter.materialize()  # type: ignore[attr-defined]
        loaded.data.normal_(generator=torch.Generator().manual_seed(seed))
        setattr(layer, name, loaded)
    if isinstance(layer, ParallelLinear):
        layer.process_weights_after_loading()


def make_layer(linear_method: str) -> ColumnParallelLinear:
    columns = [("w", 1024, [(range(1024), range(1024))])]
    layer = ColumnParallelLinear(1024, 1024, columns, False, linear_method)
    load_random(layer, seed=1)
    return layer


@pytest.mark.usefixtures("without_kernels")
def test_prepacking_frees_the_original_weight_unless_it_is_shared() -> None:
    x = random_tensor((2, 1024), seed=2)
    with torch.inference_mode():
        plain, packed = make_layer("plain"), make_layer("prepacked")
        assert torch.allclose(plain(x), packed(x), atol=1e-3)
        assert [p.numel() for p in plain.parameters()] == [1024 * 1024]
        assert list(packed.parameters()) == []

        embedding = VocabParallelEmbedding(1024, 1024, SingleRankGroup())
        head = ParallelLMHead(1024, 1024, SingleRankGroup(), embedding)
        load_random(embedding, seed=1)
        load_random(head, seed=2)
        assert head.method.name == "prepacked"
        assert torch.allclose(plain(x), head(x), atol=1e-3)
        assert torch.equal(embedding(torch.tensor([5])), plain.weights["weight"][5:6])


@pytest.mark.usefixtures("without_kernels")
def test_a_plain_tied_head_shares_the_memory_of_the_embedding() -> None:
    embedding = VocabParallelEmbedding(40, 16, SingleRankGroup())
    head = ParallelLMHead(40, 16, SingleRankGroup(), embedding)
    load_random(embedding, seed=1)
    load_random(head, seed=2)
    assert head.weights["weight"] is embedding.weight


# A method's tensors, cut as the weight is cut


def test_tensors_of_packed_words_and_blocks() -> None:
    """int4 weights as GPTQ stores them: 8 inputs per int32, transposed, one row of scales per 128 inputs."""
    size, box = (512, 1024), (range(128, 256), range(256, 640))
    words = WeightTensor(torch.int32, ((1, 8), (0, 1)))
    assert words.shape(size) == (128, 512)
    assert words.box(box) == (range(32, 80), range(128, 256))
    scales = WeightTensor(torch.float16, ((1, 128), (0, 1)))
    assert scales.shape(size) == (8, 512)
    assert scales.box(box) == (range(2, 5), range(128, 256))
    blocks = WeightTensor(torch.float32, ((0, 128), (1, 128)))  # fp8: the last block may be cut off
    assert blocks.shape((500, 1024)) == (4, 8)
    assert blocks.box((range(384, 500), range(1024))) == (range(3, 4), range(8))


class Blocks(Plain):
    """fp8 weights with a scale per block of 128 x 128; only its tensors are used."""

    name = "blocks"
    shard_granularity = (128, 128)

    @property
    def tensors(self) -> dict[str, WeightTensor]:
        return {
            "weight": WeightTensor(torch.float8_e4m3fn),
            "weight_scale_inv": WeightTensor(torch.float32, ((0, 128), (1, 128))),
        }


def test_a_cut_through_a_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LINEAR_METHODS, "blocks", Blocks)
    columns = [("w", 512, [(range(128, 384), range(256))])]
    layer = ColumnParallelLinear(256, 256, columns, False, "blocks")
    assert layer.weight_scale_inv.shape == (2, 2)
    assert layer.method.weight_bytes == 256 * 256 + 2 * 2 * 4
    columns = [("w", 512, [(range(64, 320), range(256))])]
    with pytest.raises(ConfigError, match=r"w\.weight_scale_inv can be split only at multiples of 128"):
        ColumnParallelLinear(256, 256, columns, False, "blocks")


def test_mlp_shards_keep_to_the_granularity() -> None:
    assert [shard_mlp(4864, 3, rank, 128) for rank in range(3)] == [
        range(1664),
        range(1664, 3328),
        range(3328, 4864),
    ]
    assert [len(shard_mlp(4864, 3, rank)) for rank in range(3)] == [1664, 1600, 1600]
    with pytest.raises(ConfigError, match="at most 2"):
        shard_mlp(256, 3, 0, 128)
