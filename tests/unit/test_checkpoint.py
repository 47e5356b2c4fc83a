"""A checkpoint's files from their headers: whatever the library that reads the weights would refuse is refused here,
with the file and the doctor's id, and nothing that is named holds its reader for ever.
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
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


@pytest.fixture
def model(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "model"))


def ids(model: Path) -> list[str]:
    """Of all faults; the first of them is what the server ends with."""
    found = find_errors(model)
    if found:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(Config.model_validate({"checkpoint_path": str(model)}))
        assert str(caught.value) == str(found[0])
    else:
        Checkpoint.open(Config.model_validate({"checkpoint_path": str(model)}))
    return [fault.check for fault in found]


def header(file: Path, table: Any, data: bytes = b"") -> None:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_a_whole_one_has_no_fault(model: Path) -> None:
    assert ids(model) == []
    check_tokenizer(model)


def test_shards_without_an_index_say_how_many_they_are(model: Path) -> None:
    whole = model / "model.safetensors"
    whole.rename(model / "model-00001-of-00002.safetensors")
    assert ids(model) == ["M-06"]
    assert str(find_errors(model)[0]).endswith("names 2 shards, missing: model-00002-of-00002.safetensors")
    header(
        model / "model-00002-of-00002.safetensors", {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"
    )
    assert ids(model) == []


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
def test_a_table_that_cannot_be(entry: Any, data: bytes, model: Path) -> None:
    header(model / "model.safetensors", {"a": entry}, data)
    assert ids(model) == ["M-04"]
    assert "its header is damaged" in str(find_errors(model)[0])


def test_tensors_in_any_order_and_without_elements(model: Path) -> None:
    table = {
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [4, 4]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "packed": {"dtype": "F4", "shape": [2], "data_offsets": [8, 9]},
    }
    header(model / "model.safetensors", {"__metadata__": {"format": "pt"}, **table}, b"x" * 9)
    assert ids(model) == []


def test_a_file_that_is_too_long(model: Path) -> None:
    """The library refuses it as well: "incomplete metadata, file not fully covered"."""
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert ids(model) == ["M-04"]
    assert ": too long: " in str(find_errors(model)[0])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", [DEEP, '{"a": ' + "9" * 5000 + "}", "{", "[]"], ids="DNCL")
def test_json_that_is_none(name: str, text: str, model: Path) -> None:
    (model / name).write_text(text)
    assert ids(model) == ["M-04"]


def test_a_header_that_is_nested_too_deeply(model: Path) -> None:
    header(model / "model.safetensors", DEEP.encode())
    assert ids(model) == ["M-04"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.timeout(20)
def test_a_fifo_is_refused(name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert ids(model) == ["M-04"]
    assert f"{model / name}: cannot be read: it is a FIFO; allowed: a regular file" in str(find_errors(model)[0])


@pytest.mark.timeout(20)
def test_settings_files_are_read_with_bounds(tmp_path: Path) -> None:
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with large.open("wb") as stream:
        stream.truncate(files.MAX_FILE_BYTES + 1)
    for path, why in ((fifo, "it is a FIFO"), (Path("/dev/zero"), "it is a device"), (large, "larger than 16 MiB")):
        with pytest.raises(ConfigError, match=why):
            read_members(Config.model_validate({"distribute_config_file": str(path)}))
        with pytest.raises(ConfigError, match=why):
            secret(Config.model_validate({"gang_secret_file": str(path)}))
        with pytest.raises(OSError, match=str(path)):
            files.read(path)
    assert files.read(Path("/proc/self/cmdline")), "a file that says it has no size"


@pytest.mark.parametrize("kept", ["index", "numbers", "alone"])
def test_a_link_that_leads_nowhere_names_its_target(kept: str, model: Path) -> None:
    """The snapshot of a Hugging Face cache, mounted without its blobs."""
    name = "model.safetensors" if kept == "alone" else "model-00001-of-00001.safetensors"
    (model / "model.safetensors").unlink()
    (model / name).symlink_to("../../blobs/0123abcd")
    if kept == "index":
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert ids(model) == ["M-06"]
    assert "it is a link to ../../blobs/0123abcd, which does not exist here" in str(find_errors(model)[0])


def test_an_index_that_is_such_a_link(model: Path) -> None:
    (model / "model.safetensors.index.json").symlink_to("../../blobs/0123abcd")
    assert ids(model) == ["M-06"]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN = [
    ("tokenizer.json", LFS, "M-05"),
    ("tokenizer.json", "{", "M-07"),
    ("tokenizer.json", "[]", "M-07"),
    ("tokenizer.json", DEEP, "M-07"),
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


@pytest.mark.parametrize(("name", "text", "id"), BROKEN)
def test_a_tokenizer_that_cannot_be_loaded(name: str, text: str, id: str, model: Path) -> None:
    """As the API process would find, but before anything has started."""
    (model / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        check_tokenizer(model)
    assert caught.value.check == id
    assert str(model / name) in str(caught.value)
    with pytest.raises(CheckpointError):
        Tokenizer.load(model)


@pytest.mark.parametrize("text", ['{"chat_template": null}', '{"chat_template": []}', "{}", '{"chat_template": "x"}'])
def test_a_tokenizer_with_or_without_a_template(text: str, model: Path) -> None:
    (model / "tokenizer_config.json").write_text(text)
    check_tokenizer(model)
    Tokenizer.load(model)


def test_a_tokenizer_of_sentencepiece_alone(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, only the sentencepiece file"):
        check_tokenizer(model)
    with pytest.raises(CheckpointError):
        Tokenizer.load(model)


@pytest.mark.timeout(20)
def test_a_tokenizer_that_is_a_fifo(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    os.mkfifo(model / "tokenizer_config.json")
    for read in (check_tokenizer, Tokenizer.load):
        with pytest.raises(CheckpointError, match="it is a FIFO"):
            read(model)
