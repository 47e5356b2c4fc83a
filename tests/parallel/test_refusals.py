"""Invalid input, end to end: the process exits with the documented code and a message that says what to fix."""

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
from tests.quick import slow_except

START_SECONDS = 50.0  # takes less than one second on an idle machine, or six if other parts must be told


def rejected(env: Mapping[str, str], *args: str, code: int, port: int = 0, seconds: float = START_SECONDS) -> str:
    """Starts a part, asserts that it exits with `code` and leaves nothing behind. Returns its log."""
    port = port or free_start_port()
    with Part({"START_PORT": str(port), **env}, args, port=port) as part:
        assert part.wait_end(seconds) == code, part.log
        assert "Traceback" not in part.log
        return part.log


GOOD = {"x_part0": {"name": "x_part0", "ip": "127.0.0.1"}, "x_part1": {"name": "x_part1", "ip": "127.0.0.2"}}
TWO = {"TP_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ('{\n  "x_part0": {"ip": "a"}\n  "x_part1": {}}', ["malformed JSON at line 3, column 3"]),
        pytest.param(
            json.dumps(GOOD).replace('"name": "x_part1"', '"name": "y"'),
            ["'x_part1'", "'y'", "must be the same"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            json.dumps(GOOD)[:-1] + ', "x_part0": {"ip": "b"}}', ["duplicate key 'x_part0'"], marks=pytest.mark.slow
        ),
        pytest.param(json.dumps({"x_part1": GOOD["x_part1"]}), ["no member ends in _part0"], marks=pytest.mark.slow),
    ],
    ids=["malformed", "name", "duplicate", "no part 0"],
)
def test_invalid_distribute_file_exits_64(
    settings: dict[str, str], tmp_path: Path, content: str, messages: Sequence[str]
) -> None:
    file = tmp_path / "gang.json"
    file.write_text(content)
    log = rejected({**settings, **TWO, "DISTRIBUTE_CONFIG_FILE": str(file)}, code=64)
    assert all(message in log for message in [f"DISTRIBUTE_CONFIG_FILE {file}", *messages]), log


@pytest.mark.parametrize(
    ("env", "args", "messages"),
    [
        pytest.param(
            {"TP_SIZE": "4", "LOCAL_WORLD_SIZE": "3"},
            [],
            ["WORLD_SIZE=4", "LOCAL_WORLD_SIZE=3", "allowed: 1, 2, 4"],
            marks=pytest.mark.slow,
        ),
        ({"ACT_TYPE": "int3"}, ["--tp_size=0"], ["ACT_TYPE='int3'", "TP_SIZE='0'"]),
        pytest.param(
            {}, ["--tp-size=2"], ["unknown argument '--tp-size=2'", "did you mean --tp_size"], marks=pytest.mark.slow
        ),
        ({"CHECKPOINT_PATH": "/nowhere"}, [], ["CHECKPOINT_PATH=/nowhere: does not exist"]),
        pytest.param(
            {**TWO, "JSON_GANG_PARTS": '{"x_part0": {"ip": "127.0.0.1", "port": 1035}, "x_part1": {"ip": "a"}}'},
            [],
            ["START_PORT=", "'x_part0'", "has port 1035"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sizes", "values", "flag", "checkpoint", "port"],
)
def test_invalid_settings_exit_64(
    settings: dict[str, str], env: dict[str, str], args: Sequence[str], messages: Sequence[str]
) -> None:
    log = rejected({**settings, **env}, *args, code=64)
    assert all(message in log for message in messages), log


PORTS = [(0, "HTTP"), (1, "rendezvous"), (11, "torch.distributed")]


@pytest.mark.parametrize(("below", "purpose"), slow_except(PORTS, (1, "rendezvous")))
def test_port_in_use_exits_64_with_the_pid_of_its_owner(settings: dict[str, str], below: int, purpose: str) -> None:
    port = free_start_port(2)
    with closing(listen("127.0.0.1", port - below)), socket.socket():
        env = {**settings, "TP_SIZE": "2", "START_PORT": str(port)}
        with Part(env, port=port) as part:
            code, log = part.wait_end(START_SECONDS), part.log
            part.port = free_start_port()  # the port above is still in use, by this test
    assert code == 64
    assert f"port {port - below}, wanted for {purpose}" in log
    assert f"in use by pid {os.getpid()}" in log


def copy_of(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_truncated_shard_exits_65(settings: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    path = copy_of(checkpoint, tmp_path)
    shard = path / "model.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1000)
    log = rejected({**settings, "CHECKPOINT_PATH": str(path)}, code=65)
    assert f"{shard}: cut off: {size - 1000} bytes, its header says {size}" in log


def test_missing_tokenizer_exits_65(settings: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    path = copy_of(checkpoint, tmp_path)
    (path / "tokenizer.json").unlink()
    log = rejected({**settings, "CHECKPOINT_PATH": str(path), "TOKENIZER_PATH": str(path)}, code=65)
    assert f"{path}: no tokenizer.json" in log


@pytest.mark.slow
def test_truncated_tokenizer_exits_65(settings: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    path = copy_of(checkpoint, tmp_path)
    (path / "tokenizer.json").write_text('{"model": ')
    log = rejected({**settings, "CHECKPOINT_PATH": str(path), "TOKENIZER_PATH": str(path)}, code=65)
    assert f"{path}/tokenizer.json: malformed JSON: " in log


@pytest.mark.slow
def test_tokenizer_that_the_api_cannot_load_exits_65(
    settings: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    """tokenizer.json is valid JSON that only the tokenizers library rejects."""
    path = copy_of(checkpoint, tmp_path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["no", "such"]]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    env = {**settings, "CHECKPOINT_PATH": str(path), "TOKENIZER_PATH": str(path)}
    log = rejected(env, code=65, seconds=60)
    assert "tokenizer.json" in log
    assert "a restart cannot fix this; the part ends with exit code 65" in log
