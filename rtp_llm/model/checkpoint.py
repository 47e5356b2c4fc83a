"""A checkpoint folder, read from headers only: which tensors it has, where their bytes lie, and whether the files
are whole.

Imports no torch, so that start_server can refuse a bad checkpoint within a second and the doctor can share the checks.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rtp_llm import files
from rtp_llm.config import Config
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.model.spec import ModelSpec, spec_from_config

_LFS = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100 << 20  # bytes; the format's own limit (safetensors, format description)
_MAX_INDEX_BYTES = 64 << 20  # bytes; of a model with 60 layers of 256 experts it has nine
_MAX_TOKENIZER_BYTES = 256 << 20  # bytes; the largest of today have some 35 MB
_MAX_SHARDS = 10_000
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


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
        path = checkpoint_directory(settings)
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


def checkpoint_directory(settings: Config) -> Path:
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


def find_errors(path: Path) -> list[CheckpointError]:
    """Everything that is wrong with the files of a checkpoint folder, where `Checkpoint.open` stops at the first."""
    found: list[CheckpointError] = []

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CheckpointError as error:
            found.append(error)

    attempt(lambda: _read_json(path / "config.json"))
    shards = attempt(lambda: _shards(path))
    for file in sorted(path.glob("*.safetensors")):
        if shards is None and not file.exists():
            continue  # named already
        attempt(lambda file=file: _read_header(file, hashlib.sha256()))  # type: ignore[misc]
    return found


def check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError where the API process could not load the tokenizer of this folder. That its inner tables
    fit each other is only known to the library which reads them."""
    file, configs = folder / "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json")
    if not file.exists() and not file.is_symlink():
        other = ", only the sentencepiece file tokenizer.model" if (folder / "tokenizer.model").exists() else ""
        raise CheckpointError(f"{folder}: no tokenizer.json{other}", check="M-07")
    if not _has_vocabulary(_read_json(file, most=_MAX_TOKENIZER_BYTES, check="M-07")):
        raise CheckpointError(f"{file}: has no vocabulary (model.vocab, added_tokens); copy it again", check="M-07")
    for name in configs:
        path = folder / name
        config = _read_json(path, check="M-07") if path.exists() or path.is_symlink() else {}
        if not _are_templates(config.get("chat_template")):
            raise CheckpointError(
                f'{path}: chat_template must be text or a list of {{"name": …, "template": …}}', check="M-07"
            )


def _has_vocabulary(table: dict[str, Any]) -> bool:
    """Tokens with their ids, or (in a unigram model) a list of them in order."""
    model, added = table.get("model"), table.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbered = isinstance(vocabulary, dict) and all(type(id) is int for id in vocabulary.values())
    known = isinstance(added, list) and all(isinstance(t, dict) and type(t.get("id")) is int for t in added)
    return known and (numbered or isinstance(vocabulary, list))


def _are_templates(value: Any) -> bool:
    named = isinstance(value, list) and all(isinstance(v, dict) and {"name", "template"} <= v.keys() for v in value)
    return not value or isinstance(value, str) or named


def _overrides(settings: Config) -> dict[str, Any]:
    if not settings.json_model_override_args:
        return {}
    try:
        value = json.loads(settings.json_model_override_args)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"JSON_MODEL_OVERRIDE_ARGS: malformed JSON at column {error.colno}: {error.msg}", check="M-14"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise ConfigError(f"JSON_MODEL_OVERRIDE_ARGS: malformed JSON: {error}", check="M-14") from None
    if not isinstance(value, dict):
        raise ConfigError("JSON_MODEL_OVERRIDE_ARGS: must be a JSON object of config.json keys", check="M-14")
    return value


def _read_json(
    path: Path, digest: Any = None, *, most: int = files.MAX_FILE_BYTES, check: str = "M-04"
) -> dict[str, Any]:
    """`check`: the id of a file that is damaged; one that is not there, or only a pointer, has the same everywhere."""
    try:
        raw = files.read(path, most)
    except OSError as error:
        raise _unreadable(path, error, check) from None
    if raw.startswith(_LFS):
        raise CheckpointError(_lfs_message(path), check="M-05")
    if digest is not None:
        digest.update(raw)
    try:
        value = json.loads(raw)
    except (RecursionError, ValueError) as error:  # also what is no text, nested too deeply, a number without an end
        raise CheckpointError(f"{path}: malformed JSON: {error}", check=check) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object", check=check)
    return value


def _unreadable(path: Path, error: OSError, damaged: str = "M-04") -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: cannot be read: {files.explain_missing(path)}", check="M-06")
    check = "M-11" if isinstance(error, PermissionError) else damaged
    return CheckpointError(f"{path}: cannot be read: {error.strerror}", check=check)


def _lfs_message(path: Path) -> str:
    return f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}"


def _shards(path: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index where there is one."""
    index = path / "model.safetensors.index.json"
    if index.exists() or index.is_symlink():
        weight_map = _read_json(index, most=_MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map", check="M-06")
        shards = [path / name for name in sorted(set(map(str, weight_map.values())))]
        _check_present(index, shards)
        return shards
    shards = sorted(path.glob("*.safetensors"))
    _check_present(path, _numbered(shards))
    if not shards:
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(pattern))
        found = f"; found {others[0]}: convert it with transformers' save_pretrained" if others else ""
        raise CheckpointError(f"{path}: no *.safetensors file{found}", check="M-06")
    return shards


def _check_present(source: Path, shards: list[Path]) -> None:
    missing = [file for file in shards if not file.exists()]
    if missing:
        names = ", ".join(file.name for file in missing)
        link = next((f" ({files.explain_missing(file)})" for file in missing if file.is_symlink()), "")
        raise CheckpointError(f"{source}: names {len(shards)} shards, missing: {names}{link}", check="M-06")


def _numbered(shards: Iterable[Path]) -> list[Path]:
    """All that belong to files called `model-00001-of-00003.safetensors`: where there is no index, their names say how
    many there are."""
    found = {(m[1], len(m[2]), m[3], file.parent) for file in shards if (m := _NUMBERED.fullmatch(file.name))}
    return [
        folder / f"{stem}-{number:0{digits}}-of-{total}.safetensors"
        for stem, digits, total, folder in sorted(found)
        for number in range(1, min(int(total), _MAX_SHARDS) + 1)
    ]


def _read_header(file: Path, digest: Any) -> dict[str, TensorInfo]:
    """One file's table of tensors, checked against the file's size."""
    try:
        files.check_regular(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if head == _LFS[:8]:
                raise CheckpointError(_lfs_message(file), check="M-05")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < length <= min(_MAX_HEADER_BYTES, size):
                raise CheckpointError(f"{file}: not a safetensors file, or cut off: {size} bytes", check="M-04")
            raw = stream.read(length)
            table = json.loads(raw)
    except OSError as error:
        raise _unreadable(file, error) from None
    except (RecursionError, ValueError):
        raise CheckpointError(f"{file}: its header is damaged", check="M-04") from None
    digest.update(raw)
    try:
        table.pop("__metadata__", None)
        tensors = {name: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for name, entry in table.items()}
        end = _end((tuple(entry["data_offsets"]), tensors[name]) for name, entry in table.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: its header is damaged", check="M-04") from None
    if size != 8 + length + end:
        kind = "cut off" if size < 8 + length + end else "too long"
        raise CheckpointError(
            f"{file}: {kind}: {size} bytes, its header says {8 + length + end}; copy it again", check="M-04"
        )
    return tensors


def _end(spans: Iterable[tuple[tuple[int, int], TensorInfo]]) -> int:
    """Where the last tensor ends. Raises ValueError unless they lie one after another, each as long as its shape
    says, as the library that reads them demands."""
    end = 0
    for (begin, stop), tensor in sorted(spans, key=lambda span: span[0]):
        if begin != end or stop < begin or any(type(n) is not int or n < 0 for n in (begin, stop, *tensor.shape)):
            raise ValueError(tensor)
        if stop - begin != prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 0) and tensor.dtype in _ITEM_BYTES:
            raise ValueError(tensor)
        end = stop
    return end
