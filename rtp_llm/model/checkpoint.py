"""Reads config.json and the headers of a checkpoint's safetensors files. Checks names, shapes and completeness of
tensors.

Does not import torch, so that start_server (the main process of a part) can reject a bad checkpoint within a second,
and the doctor can use the same checks.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from rtp_llm import files, garbage
from rtp_llm.config import Config
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.model.spec import ModelSpec, spec_from_config
from rtp_llm.model.task import task_type

_LFS_PREFIX = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100 << 20  # limit of the safetensors format
_MAX_INDEX_BYTES = 64 << 20  # a model with 60 layers of 256 experts needs 9 MB
_MAX_TOKENIZER_BYTES = 256 << 20  # the largest common tokenizers need 35 MB
_MAX_SHARDS = 10_000
_NUMBERED_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a safetensors file. `dtype`: safetensors' name, such as F32, BF16, F16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose config.json and safetensors headers are valid."""

    path: Path
    config: dict[str, Any]  # config.json with JSON_MODEL_OVERRIDE_ARGS applied
    tensors: dict[str, TensorInfo]
    digest: str  # of config.json and all headers; must be equal on all parts of the gang

    @classmethod
    def open(cls, settings: Config) -> "Checkpoint":
        """Returns the checkpoint in CHECKPOINT_PATH; reads config.json and the safetensors headers.

        Raises ConfigError if CHECKPOINT_PATH is not a directory, CheckpointError if one of the files is invalid.
        """
        path = checkpoint_directory(settings)
        digest = hashlib.sha256()
        config = _read_json(path / "config.json", digest)
        tensors: dict[str, TensorInfo] = {}
        for file in _find_shards(path):
            tensors |= _read_header(file, digest)
        return cls(path, config | _read_overrides(settings), tensors, digest.hexdigest()[:16])

    def spec(self, settings: Config) -> ModelSpec:
        """Returns the architecture of the model, from config.json and the settings MODEL_TYPE, ACT_TYPE, QUANTIZATION
        and HACK_LAYER_NUM, which take precedence.

        Raises CheckpointError if config.json is invalid or not supported, ConfigError if a setting does not fit.
        """
        spec = spec_from_config(
            self.config,
            model_type=settings.model_type,
            act_type=settings.act_type,
            num_layers=settings.hack_layer_num,
            quantization=settings.weight_quantization,
        )
        # Embeddings need no output head, which such checkpoints often lack; a tied one takes no memory.
        return replace(spec, tie_embeddings=True) if task_type(settings) == "DENSE_EMBEDDING" else spec


def checkpoint_directory(settings: Config) -> Path:
    """Returns the directory CHECKPOINT_PATH. Raises ConfigError if it is not a directory."""
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
    """Returns all errors in the files of a checkpoint directory; `Checkpoint.open` raises the first."""
    errors: list[CheckpointError] = []

    def collect(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CheckpointError as error:
            errors.append(error)

    collect(lambda: _read_json(path / "config.json"))
    shards = collect(lambda: _find_shards(path))
    for file in sorted(path.glob("*.safetensors")):
        if shards is None and not file.exists():
            continue  # _find_shards has reported it
        collect(lambda file=file: _read_header(file, hashlib.sha256()))  # type: ignore[misc]
    return errors


def check_tokenizer(directory: Path) -> int:
    """Returns the largest token id in tokenizer.json, plus 1.

    Raises CheckpointError if the API process could not load the tokenizer of this directory. Does not detect
    inconsistent tables in tokenizer.json, which only the tokenizers library checks.
    """
    file, configs = directory / "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json")
    if not file.exists() and not file.is_symlink():
        hint = ", only the sentencepiece file tokenizer.model" if (directory / "tokenizer.model").exists() else ""
        raise CheckpointError(f"{directory}: no tokenizer.json{hint}", check="M-07")
    ids = _token_ids(_read_json(file, max_bytes=_MAX_TOKENIZER_BYTES, check="M-07"))
    if ids is None:
        raise CheckpointError(f"{file}: has no vocabulary (model.vocab, added_tokens); copy it again", check="M-07")
    for name in configs:
        path = directory / name
        config = _read_json(path, check="M-07") if path.exists() or path.is_symlink() else {}
        if not _is_chat_template(config.get("chat_template")):
            raise CheckpointError(
                f'{path}: chat_template must be text or a list of {{"name": …, "template": …}}', check="M-07"
            )
    return max(ids, default=-1) + 1


def _token_ids(tokenizer: dict[str, Any]) -> list[int] | None:
    """Returns the ids of all tokens of a parsed tokenizer.json; None if some have none.

    `model.vocab` must map tokens to integers, or list them (unigram models); `added_tokens` must have an `id` each.
    """
    model, added_tokens = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    are_tokens = isinstance(added_tokens, list) and all(isinstance(token, dict) for token in added_tokens)
    if not are_tokens or not isinstance(vocab, dict | list):
        return None
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *(t.get("id") for t in added_tokens)]
    return ids if set(map(type, ids)) <= {int} else None


def _is_chat_template(value: Any) -> bool:
    """Returns whether the value of the key chat_template is valid: a template, a list of named templates, or empty."""
    is_named = isinstance(value, list) and all(isinstance(v, dict) and {"name", "template"} <= v.keys() for v in value)
    return not value or isinstance(value, str) or is_named


def _read_overrides(settings: Config) -> dict[str, Any]:
    """Returns the parsed JSON_MODEL_OVERRIDE_ARGS. Raises ConfigError if it is not a JSON object."""
    if not settings.json_model_override_args:
        return {}
    try:
        value = json.loads(settings.json_model_override_args)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"JSON_MODEL_OVERRIDE_ARGS: malformed JSON at column {error.colno}: {error.msg}", check="M-14"
        ) from None
    except (RecursionError, ValueError) as error:  # too deeply nested, or an integer of thousands of digits
        raise ConfigError(f"JSON_MODEL_OVERRIDE_ARGS: malformed JSON: {error}", check="M-14") from None
    if not isinstance(value, dict):
        raise ConfigError("JSON_MODEL_OVERRIDE_ARGS: must be a JSON object of config.json keys", check="M-14")
    return value


def _read_json(
    path: Path, digest: Any = None, *, max_bytes: int = files.MAX_FILE_BYTES, check: str = "M-04"
) -> dict[str, Any]:
    """Returns the JSON object in a file, and adds the bytes of the file to `digest`, a hashlib object.

    Raises CheckpointError with the id of a doctor check: `check` if the file is damaged, M-06 if it is missing, M-11 if
    access is denied, M-05 if it is a git-lfs pointer.
    """
    try:
        raw = files.read(path, max_bytes)
    except OSError as error:
        raise _make_read_error(path, error, check) from None
    if raw.startswith(_LFS_PREFIX):
        raise CheckpointError(_lfs_message(path), check="M-05")
    if digest is not None:
        digest.update(raw)
    try:
        with garbage.paused():
            value = json.loads(raw)
    except (RecursionError, ValueError) as error:  # invalid JSON or UTF-8, too deeply nested, or a huge integer
        raise CheckpointError(f"{path}: malformed JSON: {error}", check=check) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object", check=check)
    return value


def _make_read_error(path: Path, error: OSError, check: str = "M-04") -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: cannot be read: {files.explain_missing(path)}", check="M-06")
    if isinstance(error, PermissionError):
        check = "M-11"
    return CheckpointError(f"{path}: cannot be read: {error.strerror}", check=check)


def _lfs_message(path: Path) -> str:
    return f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}"


def _find_shards(path: Path) -> list[Path]:
    """Returns the model's safetensors files: those that model.safetensors.index.json names if it exists, else all."""
    index = path / "model.safetensors.index.json"
    if index.exists() or index.is_symlink():
        weight_map = _read_json(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{index}: has no weight_map (the file name of each tensor); copy it again", check="M-06"
            )
        shards = [path / name for name in sorted(set(map(str, weight_map.values())))]
        _check_present(index, shards)
        return shards
    shards = sorted(path.glob("*.safetensors"))
    _check_present(path, _expected_shards(shards))
    if not shards:
        names = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(pattern))
        hint = f"; found {names[0]}: convert it with transformers' save_pretrained" if names else ""
        raise CheckpointError(f"{path}: no *.safetensors file{hint}", check="M-06")
    return shards


def _check_present(source: Path, shards: list[Path]) -> None:
    """Raises CheckpointError if one of `shards`, the safetensors files that should exist, is missing.

    `source`: the index file, or the directory with the numbered files, from which `shards` follows.
    """
    missing = [file for file in shards if not file.exists()]
    if missing:
        names = ", ".join(file.name for file in missing)
        hint = next((f" ({files.explain_missing(file)})" for file in missing if file.is_symlink()), "")
        raise CheckpointError(f"{source}: names {len(shards)} shards, missing: {names}{hint}", check="M-06")


def _expected_shards(shards: Iterable[Path]) -> list[Path]:
    """Returns all safetensors files that should exist: `model-1-of-3.safetensors` means that there are three."""
    sets = {(m[1], len(m[2]), m[3], file.parent) for file in shards if (m := _NUMBERED_SHARD.fullmatch(file.name))}
    return [
        directory / f"{stem}-{number:0{digits}}-of-{total}.safetensors"
        for stem, digits, total, directory in sorted(sets)
        for number in range(1, min(int(total), _MAX_SHARDS) + 1)
    ]


def _read_header(file: Path, digest: Any) -> dict[str, TensorInfo]:
    """Reads the header of a safetensors file and adds its bytes to `digest`, a hashlib object.

    Returns the tensors by name. Raises CheckpointError if the header is invalid or does not match the file's size.
    """
    try:
        files.check_regular(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if prefix == _LFS_PREFIX[:8]:
                raise CheckpointError(_lfs_message(file), check="M-05")
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, size):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or truncated: {size} bytes; copy it again", check="M-04"
                )
            raw = stream.read(header_bytes)
            with garbage.paused():
                header = json.loads(raw)
    except OSError as error:
        raise _make_read_error(file, error) from None
    except (RecursionError, ValueError):
        raise CheckpointError(f"{file}: its header is damaged; copy it again", check="M-04") from None
    digest.update(raw)
    try:
        header.pop("__metadata__", None)
        tensors = {name: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        data_bytes = _validate_offsets((tuple(entry["data_offsets"]), tensors[name]) for name, entry in header.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: its header is damaged; copy it again", check="M-04") from None
    expected_size = 8 + header_bytes + data_bytes
    if size != expected_size:
        kind = "cut off" if size < expected_size else "too long"
        raise CheckpointError(
            f"{file}: {kind}: {size} bytes, its header says {expected_size}; copy it again", check="M-04"
        )
    return tensors


def _validate_offsets(tensors: Iterable[tuple[tuple[int, int], TensorInfo]]) -> int:
    """Returns the total size of all tensors in bytes.

    `tensors`: pairs of ((start, end) offsets of the data, tensor).
    Raises ValueError unless the data of the tensors is contiguous and each is as long as its shape and dtype require.
    The safetensors library rejects the same files.
    """
    end = 0
    for (start, stop), tensor in sorted(tensors, key=lambda item: item[0]):
        if start != end or stop < start or any(type(n) is not int or n < 0 for n in (start, stop, *tensor.shape)):
            raise ValueError(tensor)
        if stop - start != prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 0) and tensor.dtype in _ITEM_BYTES:
            raise ValueError(tensor)
        end = stop
    return end
