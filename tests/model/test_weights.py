"""Each rank reads only its shard of the checkpoint; errors of a checkpoint name the file or tensor."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtp_llm.config import Config
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.layers.parameter import ShardedParameter, WeightSlice, sharded_parameter
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.weights import load_weights
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.parallel.mesh import Mesh, MeshAxis
from rtp_llm.runner.residency import Residency
from tests.model import drive
from tests.model.checkpoints import CASES, CheckpointCase, edit_config, make_model, save_checkpoint
from tests.model.conftest import Oracles
from tests.model.drive import greedy_request
from tests.model.oracle import generate_answer
from tests.model.rank_pool import RankPool
from tests.quick import slow_except


def config_of(path: Path, **settings: Any) -> Config:
    return Config.model_validate({"checkpoint_path": str(path), **settings})


class FakeGroup:
    """One rank of a process group without the other ranks, which loading does not need."""

    wait_seconds: float | None = None
    is_waiting = False

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise AssertionError("loading needs no peers")

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        raise AssertionError("loading needs no peers")

    def broadcast(self, tensor: Tensor) -> Tensor:
        raise AssertionError("loading needs no peers")

    def min(self, value: int) -> int:
        return value

    def check_aborted(self) -> None:
        pass

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass


def tensor_bytes(path: Path, is_selected: Callable[[str], bool] = lambda name: True) -> int:
    files = [load_file(file) for file in path.glob("*.safetensors")]
    return sum(t.numel() * t.element_size() for tensors in files for n, t in tensors.items() if is_selected(n))


def is_replicated(name: str) -> bool:
    """Returns whether every rank holds the whole tensor: norms, and biases that are added after the all-reduce."""
    return "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias", "wo.bias"))


# One case for each kind of sharding: split, replicated and single KV heads, tied embeddings, biases, fused tensors.
SHARDED_CASES = [
    "llama-biases",
    "llama-mqa-one-layer",
    "llama-tied",
    "qwen2-14-heads",
    "qwen3",
    "internlm2-dynamic-bias",
]


@pytest.mark.parametrize("name", SHARDED_CASES)
@pytest.mark.parametrize("size", slow_except([1, 2, 3, 4, 6], 2, 3))
def test_all_ranks_together_hold_the_checkpoint(oracles: Oracles, name: str, size: int) -> None:
    """Every element of every tensor is on exactly one rank, except replicated tensors and shared KV heads."""
    path = oracles(name).path
    counts: dict[str, NDArray[np.int64]] = {}
    for rank in range(size):
        runner, load_stats = drive.load_runner(path, {}, FakeGroup(rank, size))
        parameters = [p for p in runner.residency.model.parameters() if isinstance(p, ShardedParameter)]
        local = {n: np.zeros(shape, np.int64) for p in parameters for n, shape in p.full_shapes.items()}
        for weight_slice in (weight_slice for p in parameters for weight_slice in p.slices):
            local[weight_slice.name][np.ix_(*weight_slice.source)] += 1
        assert max(count.max() for count in local.values()) == 1, "a rank reads an element twice"
        assert load_stats.bytes <= tensor_bytes(path)
        for tensor, count in local.items():
            counts[tensor] = counts.get(tensor, 0) + count
        check_contents(parameters, oracles(name).case, path)
    for tensor, count in counts.items():
        assert count.min() == 1 or is_replicated(tensor) or is_kv(tensor)
        assert count.max() == 1 or is_replicated(tensor) or is_kv(tensor)
        assert count.min() >= 1


def is_kv(name: str) -> bool:
    return "k_proj" in name or "v_proj" in name


def check_contents(parameters: list[ShardedParameter], case: CheckpointCase, path: Path) -> None:
    """Raises AssertionError unless parameters equal the checkpoint's slices, and padding is zero."""
    if case.name.startswith("internlm2"):
        return  # the file has other tensor names; test_families checks the contents
    tensors = {n: t.numpy() for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    for parameter in parameters:
        expected = np.zeros(parameter.shape, np.float32)
        for weight_slice in parameter.slices:
            expected[np.ix_(*weight_slice.target)] = tensors[weight_slice.name][np.ix_(*weight_slice.source)]
        np.testing.assert_array_equal(parameter.numpy(), expected)


@pytest.mark.parametrize("name", ["llama", "internlm2"])
def test_two_ranks_read_half_each(oracles: Oracles, name: str) -> None:
    """Six query heads on two KV heads: only the norms are read twice."""
    path = oracles(name).path
    bytes_read = [drive.load_runner(path, {}, FakeGroup(rank, 2))[1].bytes for rank in range(2)]
    total, replicated = tensor_bytes(path), tensor_bytes(path, is_replicated)
    assert sum(bytes_read) == total + replicated
    assert max(bytes_read) < 0.56 * total  # more than half: shards of vocabulary and MLP are multiples of a unit


@pytest.mark.slow
@pytest.mark.parametrize("rank_pool", [2], ids="tp{}".format, indirect=True)
def test_rank_processes_read_the_same_bytes(rank_pool: RankPool, oracles: Oracles) -> None:
    path = oracles("llama").path
    replies = rank_pool.run(path, [[greedy_request([1, 2], 1)]]).replies
    assert [r["bytes"] for r in replies] == [
        drive.load_runner(path, {}, FakeGroup(rank, 2))[1].bytes for rank in range(2)
    ]


def test_one_weight_at_a_time_is_in_memory_beside_the_packed_ones(oracles: Oracles) -> None:
    """The peak memory of loading is that of the packed model and one weight as it was read."""
    alive: list[weakref.ref[Tensor]] = []
    numbers: list[int] = []
    materialize = ShardedParameter.materialize

    def recording_materialize(parameter: ShardedParameter) -> ShardedParameter:
        loaded = materialize(parameter)
        if loaded.dim() == 2:
            alive.append(weakref.ref(loaded))
            numbers.append(sum(ref() is not None for ref in alive))
        return loaded

    with (
        mock.patch("rtp_llm.kernels.linear_methods.MIN_PREPACKED_ELEMENTS", 1),
        mock.patch.object(ShardedParameter, "materialize", recording_materialize),
    ):
        runner, _ = drive.load_runner(oracles("llama").path, {}, SingleRankGroup())
    assert len(numbers) == 1 + 4 * runner.residency.spec.num_layers + 1
    assert max(numbers) == 2, "more than the embedding, which stays, and the weight that is being read"


class Experts(torch.nn.Module):
    """Parameters that hold one expert of a stacked tensor, and rows of an interleaved one."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"experts": (4, 6, 5), "interleaved": (12, 5)}
        rows, columns = range(6), range(5)
        self.expert = sharded_parameter(
            (6, 5), [WeightSlice("experts", (range(2, 3), rows, columns), (rows, columns))], shapes
        )
        self.two_experts = sharded_parameter(
            (2, 3, 5),
            [WeightSlice("experts", (range(1, 4, 2), range(3, 6), columns), (range(2), range(3), columns))],
            shapes,
        )
        odd, even, last = range(1, 12, 2), range(0, 12, 2), range(6, 12)
        self.halves = sharded_parameter(
            (12, 5),
            [
                WeightSlice("interleaved", (odd, columns), (rows, columns)),
                WeightSlice("interleaved", (even, columns), (last, columns)),
            ],
            shapes,
        )
        self.spread = sharded_parameter((12, 5), [WeightSlice("interleaved", (last, columns), (even, columns))], shapes)


def test_slices_of_any_number_of_dimensions_and_steps(copy_checkpoint: Callable[[str], Path]) -> None:
    path, model = copy_checkpoint("llama"), Experts()
    tensors = {"experts": torch.rand(4, 6, 5), "interleaved": torch.rand(12, 5)}
    save_file(tensors, path / "model.safetensors")
    checkpoint = Checkpoint.open(config_of(path))
    load_stats = load_weights(model, checkpoint, checkpoint.spec(config_of(path)), lambda fraction: None)
    assert load_stats.bytes == 4 * 5 * (6 + 2 * 3 + 12 + 6)
    assert torch.equal(model.expert, tensors["experts"][2])
    assert torch.equal(model.two_experts, tensors["experts"][[1, 3], 3:])
    assert torch.equal(model.halves, torch.cat((tensors["interleaved"][1::2], tensors["interleaved"][::2])))
    assert torch.equal(model.spread[::2], tensors["interleaved"][6:])
    assert not model.spread[1::2].any(), "padding"


# Invalid checkpoints


@pytest.fixture
def copy_checkpoint(oracles: Oracles, tmp_path: Path) -> Callable[[str], Path]:
    """Returns a function that copies the checkpoint of a case, so that the test can damage the copy."""
    return lambda name: shutil.copytree(oracles(name).path, tmp_path / name)


def load_error(path: Path, **settings: Any) -> str:
    """Loads an invalid checkpoint. Returns the error message."""
    with pytest.raises(CheckpointError) as error_info:
        drive.load_runner(path, settings, SingleRankGroup())
    return str(error_info.value)


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


LLAMA_NAMES = [
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]
INTERNLM2_NAMES = [
    "model.tok_embeddings.weight",
    "model.layers.1.attention.wqkv.weight",
    "model.layers.1.attention.wo.weight",
    "model.layers.0.feed_forward.w2.weight",
    "model.layers.0.feed_forward.w3.weight",
    "model.layers.1.ffn_norm.weight",
    "output.weight",
]
TENSORS = [("llama", n) for n in LLAMA_NAMES] + [("internlm2", n) for n in INTERNLM2_NAMES]


@pytest.mark.parametrize(("name", "tensor"), TENSORS)
def test_missing_tensor(copy_checkpoint: Callable[[str], Path], name: str, tensor: str) -> None:
    path = copy_checkpoint(name)
    edit_tensors(path, lambda tensors: tensors.pop(tensor))
    message = load_error(path)
    assert "missing" in message
    assert tensor in message


@pytest.mark.parametrize(("name", "tensor"), TENSORS)
@pytest.mark.parametrize("change", ["shorter", "longer", "narrower", "wider"])
def test_tensor_with_wrong_shape(copy_checkpoint: Callable[[str], Path], name: str, tensor: str, change: str) -> None:
    """A larger tensor is an error too: otherwise a slice of it would be loaded, and the output would be wrong."""

    def reshape(tensors: dict[str, Tensor]) -> None:
        old = tensors[tensor]
        axis = 0 if change in ("shorter", "longer") else old.dim() - 1
        if change in ("shorter", "narrower"):
            tensors[tensor] = old.narrow(axis, 0, old.shape[axis] - 8).contiguous()
        else:
            tensors[tensor] = torch.cat([old, old.narrow(axis, 0, 8)], axis)

    path = copy_checkpoint(name)
    edit_tensors(path, reshape)
    message = load_error(path)
    assert tensor in message
    assert "shape" in message


def test_invalid_checkpoint_is_not_read(copy_checkpoint: Callable[[str], Path]) -> None:
    path = copy_checkpoint("llama")
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    config = config_of(path)
    checkpoint = Checkpoint.open(config)
    residency = Residency(config, checkpoint.spec(config), Mesh(MeshAxis()), torch.device("cpu"), 64)
    fractions: list[float] = []
    with pytest.raises(CheckpointError):
        residency.load(checkpoint, fractions.append)
    assert fractions == []


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 5000])
@pytest.mark.parametrize(
    ("name", "file"), [("llama", "model.safetensors"), ("llama-biases", "model-00003-of-00005.safetensors")]
)
def test_truncated_file(copy_checkpoint: Callable[[str], Path], name: str, file: str, num_bytes: int) -> None:
    path = copy_checkpoint(name)
    assert (path / file).exists()
    (path / file).write_bytes((path / file).read_bytes()[:num_bytes])
    message = load_error(path)
    assert file in message
    assert any(word in message for word in ("truncated", "cut off", "damaged"))


def test_last_byte_missing(copy_checkpoint: Callable[[str], Path]) -> None:
    path = copy_checkpoint("llama")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut off" in load_error(path)


def test_damaged_header(copy_checkpoint: Callable[[str], Path]) -> None:
    path = copy_checkpoint("llama")
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)
    message = load_error(path)
    assert "model.safetensors" in message
    assert "damaged" in message


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_git_lfs_pointer(copy_checkpoint: Callable[[str], Path], file: str) -> None:
    path = copy_checkpoint("llama")
    (path / file).write_text(POINTER)
    message = load_error(path)
    assert str(path / file) in message
    assert "git lfs pull" in message


def test_missing_shard(copy_checkpoint: Callable[[str], Path]) -> None:
    path = copy_checkpoint("llama-biases")
    (path / "model-00002-of-00005.safetensors").unlink()
    message = load_error(path)
    assert "model.safetensors.index.json" in message
    assert "missing: model-00002-of-00005.safetensors" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_invalid_index(copy_checkpoint: Callable[[str], Path], index: str) -> None:
    path = copy_checkpoint("llama-biases")
    (path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in load_error(path)


def test_tensor_that_is_only_in_the_index(copy_checkpoint: Callable[[str], Path]) -> None:
    path = copy_checkpoint("llama-biases")
    file = path / "model-00005-of-00005.safetensors"
    tensors = load_file(file)
    name, _ = tensors.popitem()
    save_file(tensors, file)
    assert name in load_error(path)


def test_pickled_weights(copy_checkpoint: Callable[[str], Path]) -> None:
    path = copy_checkpoint("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    message = load_error(path)
    assert "no *.safetensors" in message
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"a": NaN', "\xff"])
def test_config_that_is_not_a_json_object(copy_checkpoint: Callable[[str], Path], text: str) -> None:
    path = copy_checkpoint("llama")
    (path / "config.json").write_bytes(text.encode("latin-1"))
    assert str(path / "config.json") in load_error(path)


def test_invalid_checkpoint_path(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "file", "is a file")):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=reason):
            Checkpoint.open(config_of(path))
    with pytest.raises(ConfigError, match="CHECKPOINT_PATH"):
        Checkpoint.open(Config.model_validate({}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(config_of(tmp_path))


def test_digest_differs_between_checkpoints(copy_checkpoint: Callable[[str], Path], oracles: Oracles) -> None:
    """The parts of a gang compare digests to detect that they have different models."""

    def digest(path: Path) -> str:
        return Checkpoint.open(config_of(path)).digest

    original, path = oracles("llama").path, copy_checkpoint("llama")
    assert digest(path) == digest(original)
    edit_config(path, lambda config: config | {"rms_norm_eps": 2e-5})
    assert digest(path) != digest(original)
    assert digest(oracles("rope-linear").path) != digest(original)


# Dtypes


@pytest.mark.parametrize("act_type", ["bf16", "fp16"])
def test_half_precision(oracles: Oracles, act_type: str) -> None:
    """Logits correlate with those in float32; the precision of the dtype allows no closer comparison."""
    oracle = oracles("llama-biases")
    engine = drive.make_single_rank_engine(oracle.path, act_type=act_type)
    completions = drive.run(engine, [greedy_request(a.prompt, 8, id=str(i)) for i, a in enumerate(oracle.answers)])
    for index, expected in enumerate(oracle.answers):
        logits = completions[str(index)].logits[0]
        assert logits.dtype == np.float32
        assert np.corrcoef(logits, expected.logits[0])[0, 1] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("rank_pool", [3], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize("collectives", ["local", "gloo"])
@pytest.mark.parametrize("act_type", ["bf16", "fp16"])
def test_half_precision_on_several_ranks(
    rank_pool: RankPool, oracles: Oracles, act_type: str, collectives: str
) -> None:
    oracle = oracles("llama-biases")
    requests = [greedy_request(a.prompt, 2, id=str(i)) for i, a in enumerate(oracle.answers)]
    completions = rank_pool.run(oracle.path, [requests], collectives, act_type=act_type, warm_up=True).completions
    for index, expected in enumerate(oracle.answers):
        assert np.corrcoef(completions[str(index)].logits[0], expected.logits[0])[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """ACT_TYPE=fp32 on a half-precision checkpoint equals an oracle that computes the rounded weights in float32."""
    case = next(c for c in CASES if c.name == "llama-biases")
    model = make_model(case, 1)
    torch.nn.Module.to(model, dtype)
    save_checkpoint(model, case, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    config = config_of(tmp_path)
    assert Checkpoint.open(config).spec(config).dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    expected = generate_answer(model.float(), list(range(1, 60)))
    completion = drive.run(
        drive.make_single_rank_engine(tmp_path, act_type="fp32"), [greedy_request(expected.prompt, 64)]
    )["0"]
    expected.check(completion.tokens, completion.logits)


def test_first_layers_only(oracles: Oracles, caplog: pytest.LogCaptureFixture) -> None:
    """HACK_LAYER_NUM: the tensors of other layers are ignored without a warning."""
    oracle = oracles("llama")
    engine = drive.make_single_rank_engine(oracle.path, hack_layer_num=1)
    tokens = drive.run(engine, [greedy_request(oracle.answers[0].prompt, 10)])["0"].tokens
    assert tokens != oracle.answers[0].tokens[:10]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_unused_tensors_are_logged(copy_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    path = copy_checkpoint("llama")
    edit_tensors(path, lambda tensors: tensors.update({"model.layers.0.surprise.weight": torch.ones(2)}))
    drive.load_runner(path, {}, SingleRankGroup())
    assert "model.layers.0.surprise.weight" in caplog.text


@pytest.mark.parametrize(
    ("settings", "num_tokens", "reason"),
    [
        ({"test_block_num": 8}, 8 * 16, "TEST_BLOCK_NUM=8"),
        ({"test_block_num": 8, "max_seq_len": 100}, 100, "MAX_SEQ_LEN=100"),
        ({"test_block_num": 4096}, None, "the checkpoint's maximum, because MAX_SEQ_LEN is not set"),
    ],
)
def test_names_what_bounds_a_sequence(
    copy_checkpoint: Callable[[str], Path], settings: dict[str, int], num_tokens: int | None, reason: str
) -> None:
    path = copy_checkpoint("llama")
    config = config_of(path, **settings, warm_up=False)
    spec = Checkpoint.open(config).spec(config)
    limit = config.max_seq_len or spec.max_positions
    residency = Residency(config, spec, Mesh(MeshAxis()), torch.device("cpu"), limit)
    residency.mesh.tp.bind(SingleRankGroup())
    residency.allocate_kv_cache(1)
    assert residency.max_seq_len == (num_tokens or spec.max_positions)
    assert residency.max_seq_len_reason == reason


def test_max_seq_len_that_does_not_fit_names_the_setting_that_bounds_it(copy_checkpoint: Callable[[str], Path]) -> None:
    config = config_of(copy_checkpoint("llama"), test_block_num=8, max_seq_len=200, warm_up=False)
    residency = Residency(config, Checkpoint.open(config).spec(config), Mesh(MeshAxis()), torch.device("cpu"), 200)
    residency.mesh.tp.bind(SingleRankGroup())
    with pytest.raises(ConfigError, match=r"holds 128 tokens because of TEST_BLOCK_NUM=8; allowed: at most 128"):
        residency.allocate_kv_cache(1)
