"""Each rank reads its own share of the checkpoint and no more, and a checkpoint that does not fit is refused by
name.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtp_llm.config import Config
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.layers.parameter import ShardedParameter
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.checkpoints import CASES, CheckpointCase, edit_config, make_model, save
from tests.model.conftest import Oracles
from tests.model.drive import greedy
from tests.model.oracle import answer
from tests.model.rank_pool import RankPool


def config_of(path: Path) -> Config:
    return Config.model_validate({"checkpoint_path": str(path)})


class FakeGroup:
    """A rank's seat without the others: loading needs none of them."""

    wait_seconds: float | None = None

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise AssertionError("loading needs no peers")

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        raise AssertionError("loading needs no peers")

    def min(self, value: int) -> int:
        return value

    def close(self) -> None:
        pass


def tensor_bytes(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> int:
    files = [load_file(file) for file in path.glob("*.safetensors")]
    return sum(t.numel() * t.element_size() for tensors in files for n, t in tensors.items() if wanted(n))


def is_replicated(name: str) -> bool:
    """What every rank needs whole: norms, and biases that are added after the sum."""
    return "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias", "wo.bias"))


# One per way of cutting: KV heads that divide, that replicate, one for all, tied embeddings, biases, fused tensors.
CUT = ["llama-biases", "llama-mqa-one-layer", "llama-tied", "qwen2-14-heads", "qwen3", "internlm2-dynamic-bias"]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_all_ranks_together_hold_the_checkpoint(oracles: Oracles, name: str, size: int) -> None:
    """Every element of every tensor is on some rank; on exactly one, replicated ones and shared KV heads excepted."""
    path = oracles(name).path
    pieces = []
    for rank in range(size):
        runner, report = drive.load(path, {}, FakeGroup(rank, size))
        parameters = [p for p in runner.model.parameters() if isinstance(p, ShardedParameter)]
        own = [(piece.name, i) for p in parameters for piece in p.slices for i in piece.source]
        assert len(own) == len(set(own)), "a rank reads something twice"
        assert report.bytes <= tensor_bytes(path)
        pieces += own
        check_contents(parameters, oracles(name).case, path)
    for name, indices in by_name(pieces).items():
        counts = np.bincount(indices)
        assert counts.min() == 1 or is_replicated(name) or is_kv(name)
        assert counts.max() == 1 or is_replicated(name) or is_kv(name)
        assert counts.min() >= 1


def is_kv(name: str) -> bool:
    return "k_proj" in name or "v_proj" in name


def by_name(pieces: list[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, index in pieces:
        found.setdefault(name, []).append(index)
    return found


def check_contents(parameters: list[ShardedParameter], case: CheckpointCase, path: Path) -> None:
    """What was read is what the model had, and what nothing was read into is zero: padding must not count."""
    if case.name.startswith("internlm2"):
        return  # its names on disk are others; test_families sees its contents
    tensors = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    for parameter in parameters:
        expected = torch.zeros(parameter.shape)
        for piece in parameter.slices:
            source, target = torch.arange(*bounds(piece.source)), torch.arange(*bounds(piece.target))
            expected.index_copy_(piece.dim, target, tensors[piece.name].index_select(piece.dim, source))
        assert torch.equal(parameter.data, expected)


def bounds(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop


@pytest.mark.parametrize("name", ["llama", "internlm2"])
def test_two_ranks_read_half_each(oracles: Oracles, name: str) -> None:
    """Six query heads on two KV heads: nothing is read twice but the norms."""
    path = oracles(name).path
    read = [drive.load(path, {}, FakeGroup(rank, 2))[1].bytes for rank in range(2)]
    whole, shared = tensor_bytes(path), tensor_bytes(path, is_replicated)
    assert sum(read) == whole + shared
    assert max(read) < 0.56 * whole  # vocabulary and MLP are cut at round numbers, not in the middle


@pytest.mark.parametrize("gang", [2], ids="tp{}".format, indirect=True)
def test_real_ranks_report_the_same(gang: RankPool, oracles: Oracles) -> None:
    path = oracles("llama").path
    replies = gang.run(path, [[greedy([1, 2], 1)]]).replies
    assert [r["bytes"] for r in replies] == [drive.load(path, {}, FakeGroup(rank, 2))[1].bytes for rank in range(2)]


# Checkpoints that cannot be used


@pytest.fixture
def copy(oracles: Oracles, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint's folder, free to be damaged."""
    return lambda name: shutil.copytree(oracles(name).path, tmp_path / name)


def refuse(path: Path, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        drive.load(path, settings, SingleRankGroup())
    return str(caught.value)


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
def test_missing_tensor(copy: Callable[[str], Path], name: str, tensor: str) -> None:
    path = copy(name)
    edit_tensors(path, lambda tensors: tensors.pop(tensor))
    message = refuse(path)
    assert "missing" in message
    assert tensor in message


@pytest.mark.parametrize(("name", "tensor"), TENSORS)
@pytest.mark.parametrize("change", ["shorter", "longer", "narrower", "wider"])
def test_tensor_of_another_shape(copy: Callable[[str], Path], name: str, tensor: str, change: str) -> None:
    """Larger is as wrong as smaller: it is another model's, and would give wrong answers rather than none."""

    def reshape(tensors: dict[str, Tensor]) -> None:
        old = tensors[tensor]
        axis = 0 if change in ("shorter", "longer") else old.dim() - 1
        if change in ("shorter", "narrower"):
            tensors[tensor] = old.narrow(axis, 0, old.shape[axis] - 8).contiguous()
        else:
            tensors[tensor] = torch.cat([old, old.narrow(axis, 0, 8)], axis)

    path = copy(name)
    edit_tensors(path, reshape)
    message = refuse(path)
    assert tensor in message
    assert "shape" in message


def test_nothing_is_read_where_something_is_wrong(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    config = config_of(path)
    checkpoint = Checkpoint.open(config)
    runner = ModelRunner(config, checkpoint.spec(config), SingleRankGroup(), torch.device("cpu"), 64)
    steps: list[float] = []
    with pytest.raises(CheckpointError):
        runner.load(checkpoint, steps.append)
    assert steps == []


@pytest.mark.parametrize("left", [0, 4, 100, 5000])
@pytest.mark.parametrize(
    ("name", "file"), [("llama", "model.safetensors"), ("llama-biases", "model-00003-of-00005.safetensors")]
)
def test_file_that_was_cut_off(copy: Callable[[str], Path], name: str, file: str, left: int) -> None:
    path = copy(name)
    assert (path / file).exists()
    (path / file).write_bytes((path / file).read_bytes()[:left])
    message = refuse(path)
    assert file in message
    assert "cut off" in message or "damaged" in message


def test_last_byte_missing(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut off" in refuse(path)


def test_damaged_header(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)
    message = refuse(path)
    assert "model.safetensors" in message
    assert "damaged" in message


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_git_lfs_pointer(copy: Callable[[str], Path], file: str) -> None:
    path = copy("llama")
    (path / file).write_text(POINTER)
    message = refuse(path)
    assert str(path / file) in message
    assert "git lfs pull" in message


def test_shard_that_is_missing(copy: Callable[[str], Path]) -> None:
    path = copy("llama-biases")
    (path / "model-00002-of-00005.safetensors").unlink()
    message = refuse(path)
    assert "model.safetensors.index.json" in message
    assert "missing: model-00002-of-00005.safetensors" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_index_that_is_none(copy: Callable[[str], Path], index: str) -> None:
    path = copy("llama-biases")
    (path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refuse(path)


def test_tensor_in_no_shard_though_the_index_has_it(copy: Callable[[str], Path]) -> None:
    path = copy("llama-biases")
    file = path / "model-00005-of-00005.safetensors"
    tensors = load_file(file)
    lost, _ = tensors.popitem()
    save_file(tensors, file)
    assert lost in refuse(path)


def test_pickled_weights_are_named_as_such(copy: Callable[[str], Path]) -> None:
    path = copy("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    message = refuse(path)
    assert "no *.safetensors" in message
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"a": NaN', "\xff"])
def test_config_that_is_no_json_object(copy: Callable[[str], Path], text: str) -> None:
    path = copy("llama")
    (path / "config.json").write_bytes(text.encode("latin-1"))
    assert str(path / "config.json") in refuse(path)


def test_folder_that_is_none(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "file", "is a file")):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=reason):
            Checkpoint.open(config_of(path))
    with pytest.raises(ConfigError, match="CHECKPOINT_PATH"):
        Checkpoint.open(Config.model_validate({}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(config_of(tmp_path))


def test_digest_tells_checkpoints_apart(copy: Callable[[str], Path], oracles: Oracles) -> None:
    """All parts of a gang must hold the same model; this is how they find out."""

    def digest(path: Path) -> str:
        return Checkpoint.open(config_of(path)).digest

    original, path = oracles("llama").path, copy("llama")
    assert digest(path) == digest(original)
    edit_config(path, lambda config: config | {"rms_norm_eps": 2e-5})
    assert digest(path) != digest(original)
    assert digest(oracles("rope-linear").path) != digest(original)


# Types


@pytest.mark.parametrize("act_type", ["bf16", "fp16"])
def test_half_precision(oracles: Oracles, act_type: str) -> None:
    """Loads, runs, and says roughly the same; how much is lost is the type's, not ours."""
    oracle = oracles("llama-biases")
    engine = drive.alone(oracle.path, act_type=act_type)
    outcomes = drive.run(engine, [greedy(a.prompt, 8, id=str(i)) for i, a in enumerate(oracle.answers)])
    for index, expected in enumerate(oracle.answers):
        found = outcomes[str(index)].logits[0]
        assert found.dtype == np.float32
        assert np.corrcoef(found, expected.logits[0])[0, 1] > 0.99


@pytest.mark.parametrize("gang", [3], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize("collectives", ["local", "gloo"])
@pytest.mark.parametrize("act_type", ["bf16", "fp16"])
def test_half_precision_over_ranks(gang: RankPool, oracles: Oracles, act_type: str, collectives: str) -> None:
    oracle = oracles("llama-biases")
    requests = [greedy(a.prompt, 2, id=str(i)) for i, a in enumerate(oracle.answers)]
    outcomes = gang.run(oracle.path, [requests], collectives, act_type=act_type, warm_up=True).outcomes
    for index, expected in enumerate(oracle.answers):
        assert np.corrcoef(outcomes[str(index)].logits[0], expected.logits[0])[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_computed_in_full(dtype: torch.dtype, tmp_path: Path) -> None:
    """ACT_TYPE=fp32 on a checkpoint of half precision: the oracle has the rounded weights, and nothing else rounds."""
    case = next(c for c in CASES if c.name == "llama-biases")
    model = make_model(case, 1)
    torch.nn.Module.to(model, dtype)
    save(model, case, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    config = config_of(tmp_path)
    assert Checkpoint.open(config).spec(config).dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    expected = answer(model.float(), list(range(1, 60)))
    outcome = drive.run(drive.alone(tmp_path, act_type="fp32"), [greedy(expected.prompt, 64)])["0"]
    expected.check(outcome.tokens, outcome.logits)


def test_first_layers_only(oracles: Oracles, caplog: pytest.LogCaptureFixture) -> None:
    """HACK_LAYER_NUM: the rest of the checkpoint is left alone without a complaint."""
    oracle = oracles("llama")
    engine = drive.alone(oracle.path, hack_layer_num=1)
    tokens = drive.run(engine, [greedy(oracle.answers[0].prompt, 10)])["0"].tokens
    assert tokens != oracle.answers[0].tokens[:10]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_tensors_that_nobody_wants_are_mentioned(copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    path = copy("llama")
    edit_tensors(path, lambda tensors: tensors.update({"model.layers.0.surprise.weight": torch.ones(2)}))
    drive.load(path, {}, SingleRankGroup())
    assert "model.layers.0.surprise.weight" in caplog.text
