"""Header checks of checkpoint files: they reject what the safetensors and tokenizers libraries reject, with the file
name and the doctor's check id, and no FIFO or device blocks them.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtp_llm import files
from rtp_llm.config import Config, secret
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.model.checkpoint import Checkpoint, check_tokenizer, find_errors
from rtp_llm.parallel.members import read_members
from rtp_llm.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
DEEPLY_NESTED = "[" * 100_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


@pytest.fixture
def model(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "model"))


def error_ids(model: Path) -> list[str]:
    """Returns the doctor check ids of all errors. Asserts that Checkpoint.open raises the first error."""
    errors = find_errors(model)
    if errors:
        with pytest.raises(CheckpointError) as error_info:
            Checkpoint.open(Config.model_validate({"checkpoint_path": str(model)}))
        assert str(error_info.value) == str(errors[0])
    else:
        Checkpoint.open(Config.model_validate({"checkpoint_path": str(model)}))
    return [error.check for error in errors]


def write_safetensors(file: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_complete_checkpoint_has_no_errors(model: Path) -> None:
    assert error_ids(model) == []
    check_tokenizer(model)


def test_missing_shard_is_found_without_an_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    assert error_ids(model) == ["M-06"]
    assert str(find_errors(model)[0]).endswith("names 2 shards, missing: model-00002-of-00002.safetensors")
    write_safetensors(
        model / "model-00002-of-00002.safetensors", {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"
    )
    assert error_ids(model) == []


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, b""),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, b""),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, b"xxxx"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, b"x" * 8),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, b"xxxx"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, b"xxxx"),
        ({"dtype": "F32", "shape": [1], "data_offsets": "04"}, b"xxxx"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, b"xxxx"),
        ({"dtype": "F32", "data_offsets": [0, 4]}, b"xxxx"),
        ([], b""),
    ],
)
def test_invalid_header_entry(entry: Any, data: bytes, model: Path) -> None:
    write_safetensors(model / "model.safetensors", {"a": entry}, data)
    assert error_ids(model) == ["M-04"]
    assert "its header is damaged" in str(find_errors(model)[0])


def test_tensors_in_any_order_and_empty_tensors(model: Path) -> None:
    header = {
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [4, 4]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "packed": {"dtype": "F4", "shape": [2], "data_offsets": [8, 9]},
    }
    write_safetensors(model / "model.safetensors", {"__metadata__": {"format": "pt"}, **header}, b"x" * 9)
    assert error_ids(model) == []


def test_file_that_is_too_long(model: Path) -> None:
    """safetensors rejects it too: "incomplete metadata, file not fully covered"."""
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert error_ids(model) == ["M-04"]
    assert ": too long: " in str(find_errors(model)[0])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", [DEEPLY_NESTED, '{"a": ' + "9" * 5000 + "}", "{", "[]"], ids="DNCL")
def test_invalid_json(name: str, text: str, model: Path) -> None:
    (model / name).write_text(text)
    assert error_ids(model) == ["M-04"]


def test_header_that_is_nested_too_deeply(model: Path) -> None:
    write_safetensors(model / "model.safetensors", DEEPLY_NESTED.encode())
    assert error_ids(model) == ["M-04"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.timeout(20)
def test_fifo_is_rejected(name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert error_ids(model) == ["M-04"]
    assert f"{model / name}: cannot be read: it is a FIFO; allowed: a regular file" in str(find_errors(model)[0])


@pytest.mark.timeout(20)
def test_settings_files_are_limited_in_size_and_type(tmp_path: Path) -> None:
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with large.open("wb") as stream:
        stream.truncate(files.MAX_FILE_BYTES + 1)
    for path, reason in ((fifo, "it is a FIFO"), (Path("/dev/zero"), "it is a device"), (large, "larger than 16 MiB")):
        with pytest.raises(ConfigError, match=reason):
            read_members(Config.model_validate({"distribute_config_file": str(path)}))
        with pytest.raises(ConfigError, match=reason):
            secret(Config.model_validate({"gang_secret_file": str(path)}))
        with pytest.raises(OSError, match=str(path)):
            files.read(path)
    assert files.read(Path("/proc/self/cmdline")), "a file whose stat size is 0"


@pytest.mark.parametrize("layout", ["index", "numbered", "single"])
def test_dangling_link_is_reported_with_its_target(layout: str, model: Path) -> None:
    """The snapshot directory of a Hugging Face cache has such links if it is mounted without the blobs directory."""
    name = "model.safetensors" if layout == "single" else "model-00001-of-00001.safetensors"
    (model / "model.safetensors").unlink()
    (model / name).symlink_to("../../blobs/0123abcd")
    if layout == "index":
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert error_ids(model) == ["M-06"]
    assert "it is a link to ../../blobs/0123abcd, which does not exist here" in str(find_errors(model)[0])


def test_index_that_is_a_dangling_link(model: Path) -> None:
    (model / "model.safetensors.index.json").symlink_to("../../blobs/0123abcd")
    assert error_ids(model) == ["M-06"]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
INVALID_TOKENIZERS = [
    ("tokenizer.json", LFS, "M-05"),
    ("tokenizer.json", "{", "M-07"),
    ("tokenizer.json", "[]", "M-07"),
    ("tokenizer.json", DEEPLY_NESTED, "M-07"),
    ("tokenizer.json", '{"model": null}', "M-07"),
    ("tokenizer.json", '{"model": {"vocab": null}}', "M-07"),
    ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}', "M-07"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [{"id": null}]}', "M-07"),
    ("tokenizer_config.json", LFS, "M-05"),
    ("tokenizer_config.json", "{", "M-07"),
    ("tokenizer_config.json", "[]", "M-07"),
    ("tokenizer_config.json", '{"chat_template": 5}', "M-07"),
    ("tokenizer_config.json", '{"chat_template": ["x"]}', "M-07"),
    ("special_tokens_map.json", "x", "M-07"),
]


@pytest.mark.parametrize(("name", "text", "check"), INVALID_TOKENIZERS)
def test_invalid_tokenizer(name: str, text: str, check: str, model: Path) -> None:
    """`check_tokenizer`, which runs before the start, rejects files that the API process could not load."""
    (model / name).write_text(text)
    with pytest.raises(CheckpointError) as error_info:
        check_tokenizer(model)
    assert error_info.value.check == check
    assert str(model / name) in str(error_info.value)
    with pytest.raises(CheckpointError):
        Tokenizer.load(model)


@pytest.mark.parametrize("text", ['{"chat_template": null}', '{"chat_template": []}', "{}", '{"chat_template": "x"}'])
def test_tokenizer_with_or_without_chat_template(text: str, model: Path) -> None:
    (model / "tokenizer_config.json").write_text(text)
    check_tokenizer(model)
    Tokenizer.load(model)


def test_tokenizer_of_sentencepiece_only(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, only the sentencepiece file"):
        check_tokenizer(model)
    with pytest.raises(CheckpointError):
        Tokenizer.load(model)


@pytest.mark.timeout(20)
def test_tokenizer_config_that_is_a_fifo(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    os.mkfifo(model / "tokenizer_config.json")
    for read in (check_tokenizer, Tokenizer.load):
        with pytest.raises(CheckpointError, match="it is a FIFO"):
            read(model)
