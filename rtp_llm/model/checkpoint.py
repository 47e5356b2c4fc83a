"""A checkpoint folder, read from headers only: which tensors it has, where their bytes lie, and whether the files
are whole.

Imports no torch, so that start_server can refuse a bad checkpoint within a second and the doctor can share the checks.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtp_llm.config import Config
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.model.spec import ModelSpec, spec_from_config

_LFS = b"version https://git-lfs"
_MAX_HEADER = 100 << 20  # bytes; the format's own limit (safetensors, format description)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; `dtype` in safetensors' spelling: F32, BF16, F16 …"""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has passed the header checks."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    digest: str  # of config.json and all headers: equal on parts that hold the same checkpoint

    @classmethod
    def open(cls, settings: Config) -> "Checkpoint":
        """Raises ConfigError where CHECKPOINT_PATH cannot be one, CheckpointError where its files are not whole."""
        path = folder(settings)
        digest = hashlib.sha256()
        config = _read_json(path / "config.json", digest)
        tensors: dict[str, TensorInfo] = {}
        for file in _shards(path):
            tensors |= _read_header(file, digest)
        return cls(path, config | _overrides(settings), tensors, digest.hexdigest()[:16])

    def spec(self, settings: Config) -> ModelSpec:
        return spec_from_config(
            self.config,
            model_type=settings.model_type,
            act_type=settings.act_type,
            num_layers=settings.hack_layer_num,
        )


def folder(settings: Config) -> Path:
    """CHECKPOINT_PATH, which must be a folder. Raises ConfigError."""
    if not settings.checkpoint_path:
        raise ConfigError(
            "CHECKPOINT_PATH is not set; allowed: a folder with config.json and *.safetensors", check="M-06"
        )
    path = Path(settings.checkpoint_path)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"CHECKPOINT_PATH={path}: {kind}; allowed: a folder with config.json and *.safetensors", check="M-08"
        )
    return path


def faults(path: Path) -> list[CheckpointError]:
    """Everything that is wrong with the files of a checkpoint folder, where `Checkpoint.open` stops at the first."""
    found: list[CheckpointError] = []

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CheckpointError as error:
            found.append(error)

    attempt(lambda: _read_json(path / "config.json"))
    attempt(lambda: _shards(path))
    for file in sorted(path.glob("*.safetensors")):
        attempt(lambda file=file: _read_header(file, hashlib.sha256()))  # type: ignore[misc]
    return found


def _overrides(settings: Config) -> dict[str, Any]:
    if not settings.json_model_override_args:
        return {}
    try:
        value = json.loads(settings.json_model_override_args)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"JSON_MODEL_OVERRIDE_ARGS: malformed JSON at column {error.colno}: {error.msg}", check="M-14"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError("JSON_MODEL_OVERRIDE_ARGS: must be a JSON object of config.json keys", check="M-14")
    return value


def _read_json(path: Path, digest: Any = None) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", check=_unreadable(error)) from None
    if raw.startswith(_LFS):
        raise CheckpointError(_lfs_message(path), check="M-05")
    if digest is not None:
        digest.update(raw)
    try:
        value = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: malformed JSON: {error}", check="M-04") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object", check="M-04")
    return value


def _unreadable(error: OSError) -> str:
    return "M-11" if isinstance(error, PermissionError) else "M-06"


def _lfs_message(path: Path) -> str:
    return f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}"


def _shards(path: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index where there is one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map", check="M-06")
        files = [path / str(name) for name in sorted(set(weight_map.values()))]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise CheckpointError(f"{index}: names {len(files)} shards, missing: {', '.join(missing)}", check="M-06")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(pattern))
        found = f"; found {others[0]}: convert it with transformers' save_pretrained" if others else ""
        raise CheckpointError(f"{path}: no *.safetensors file{found}", check="M-06")
    return files


def _read_header(file: Path, digest: Any) -> dict[str, TensorInfo]:
    """One file's table of tensors, checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if head == _LFS[:8]:
                raise CheckpointError(_lfs_message(file), check="M-05")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < length <= min(_MAX_HEADER, size):
                raise CheckpointError(f"{file}: not a safetensors file, or cut off: {size} bytes", check="M-04")
            raw = stream.read(length)
            table = json.loads(raw)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", check=_unreadable(error)) from None
    except ValueError:
        raise CheckpointError(f"{file}: its header is damaged", check="M-04") from None
    digest.update(raw)
    try:
        table.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
        tensors = {name: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for name, entry in table.items()}
    except (AttributeError, KeyError, TypeError, IndexError):
        raise CheckpointError(f"{file}: its header is damaged", check="M-04") from None
    if size < 8 + length + end:
        raise CheckpointError(
            f"{file}: cut off: {size} bytes, its header says {8 + length + end}; copy it again", check="M-04"
        )
    return tensors
