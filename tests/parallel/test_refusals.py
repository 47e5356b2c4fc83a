"""Wrong input, end to end: the process ends by itself, with the documented code and words that say what to mend."""

import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from rtp_llm.parallel.wire import listen
from tests.parallel.parts import Part
from tests.ports import free_start_port

AT_ONCE = 10.0  # seconds; it takes less than one, but not on a machine that is busy


def refused(env: Mapping[str, str], *args: str, code: int, port: int = 0, seconds: float = AT_ONCE) -> str:
    """The log of a part that ends with this code and leaves nothing behind."""
    port = port or free_start_port()
    with Part({"START_PORT": str(port), **env}, args, port=port) as part:
        assert part.wait_end(seconds) == code, part.log
        assert "Traceback" not in part.log
        return part.log


GOOD = {"x_part0": {"name": "x_part0", "ip": "127.0.0.1"}, "x_part1": {"name": "x_part1", "ip": "127.0.0.2"}}
TWO = {"TP_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n  "x_part0": {"ip": "a"}\n  "x_part1": {}}', ["malformed JSON at line 3, column 3"]),
        (json.dumps(GOOD).replace('"name": "x_part1"', '"name": "y"'), ["'x_part1'", "'y'", "must be the same"]),
        (json.dumps(GOOD)[:-1] + ', "x_part0": {"ip": "b"}}', ["duplicate key 'x_part0'"]),
        (json.dumps({"x_part1": GOOD["x_part1"]}), ["no member ends in _part0"]),
    ],
    ids=["malformed", "name", "duplicate", "no part 0"],
)
def test_a_wrong_distribute_file(settings: dict[str, str], tmp_path: Path, content: str, words: Sequence[str]) -> None:
    file = tmp_path / "gang.json"
    file.write_text(content)
    log = refused({**settings, **TWO, "DISTRIBUTE_CONFIG_FILE": str(file)}, code=64)
    assert all(word in log for word in [f"DISTRIBUTE_CONFIG_FILE {file}", *words]), log


@pytest.mark.parametrize(
    ("env", "args", "words"),
    [
        ({"TP_SIZE": "4", "LOCAL_WORLD_SIZE": "3"}, [], ["WORLD_SIZE=4", "LOCAL_WORLD_SIZE=3", "allowed: 1, 2, 4"]),
        ({"ACT_TYPE": "int3"}, ["--tp_size=0"], ["ACT_TYPE='int3'", "TP_SIZE='0'"]),
        ({}, ["--tp-size=2"], ["unknown argument '--tp-size=2'", "did you mean --tp_size"]),
        ({"CHECKPOINT_PATH": "/nowhere"}, [], ["CHECKPOINT_PATH=/nowhere: does not exist"]),
        (
            {**TWO, "JSON_GANG_PARTS": '{"x_part0": {"ip": "127.0.0.1", "port": 1035}, "x_part1": {"ip": "a"}}'},
            [],
            ["START_PORT=", "'x_part0'", "has port 1035"],
        ),
    ],
    ids=["sizes", "values", "flag", "checkpoint", "port"],
)
def test_wrong_settings(
    settings: dict[str, str], env: dict[str, str], args: Sequence[str], words: Sequence[str]
) -> None:
    log = refused({**settings, **env}, *args, code=64)
    assert all(word in log for word in words), log


@pytest.mark.parametrize(("below", "purpose"), [(0, "HTTP"), (1, "rendezvous"), (11, "torch.distributed")])
def test_a_port_in_use_names_its_holder(settings: dict[str, str], below: int, purpose: str) -> None:
    port = free_start_port(2)
    with closing(listen("127.0.0.1", port - below)), socket.socket():
        env = {**settings, "TP_SIZE": "2", "START_PORT": str(port)}
        with Part(env, port=port) as part:
            code, log = part.wait_end(AT_ONCE), part.log
            part.port = free_start_port()  # what is still in use there is this test's
    assert code == 64
    assert f"port {port - below}, wanted for {purpose}" in log
    assert f"in use by pid {os.getpid()}" in log


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_truncated_shard(settings: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    shard = path / "model.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1000)
    log = refused({**settings, "CHECKPOINT_PATH": str(path)}, code=65)
    assert f"{shard}: cut off: {size - 1000} bytes, its header says {size}" in log


def test_no_tokenizer(settings: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    (path / "tokenizer.json").unlink()
    log = refused({**settings, "CHECKPOINT_PATH": str(path), "TOKENIZER_PATH": str(path)}, code=65)
    assert f"{path}: no tokenizer.json" in log


def test_a_tokenizer_that_is_cut_off_is_found_at_once(
    settings: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    path = copied(checkpoint, tmp_path)
    (path / "tokenizer.json").write_text('{"model": ')
    log = refused({**settings, "CHECKPOINT_PATH": str(path), "TOKENIZER_PATH": str(path)}, code=65)
    assert f"{path}/tokenizer.json: malformed JSON: " in log


def test_a_damaged_tokenizer_is_found_by_the_api_and_ends_the_part(
    settings: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    """One that the tokenizers library alone can tell from a good one."""
    path = copied(checkpoint, tmp_path)
    damaged = json.loads((path / "tokenizer.json").read_text())
    damaged["model"]["merges"] = [["no", "such"]]
    (path / "tokenizer.json").write_text(json.dumps(damaged))
    env = {**settings, "CHECKPOINT_PATH": str(path), "TOKENIZER_PATH": str(path)}
    log = refused(env, code=65, seconds=60)
    assert "tokenizer.json" in log
    assert "a restart cannot fix this; the part ends with exit code 65" in log
