"""Text to token ids and back, from the `tokenizer.json` of a checkpoint.

The API process needs ids, the exact bytes of a token, the ids that end an answer and the chat templates, but not
transformers: this file reads the same files as `AutoTokenizer` and gives the same ids without importing it.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from rtp_llm import files
from rtp_llm.errors import CheckpointError

# The order in which `AutoTokenizer` adds the ones that tokenizer.json lacks, so that new ids come out the same.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_FILE_BYTES = 256 << 20  # bytes; the largest tokenizer.json of today have some 35 MB
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One checkpoint's tokenizer. It is never changed after loading, so any thread may use it.

    vocab_size      number of ids, added tokens included; a model's embedding may have more rows, or fewer
    bos_id          id of the tokenizer's bos_token, None where it has none
    eos_ids         ids that end an answer: the tokenizer's, generation_config.json's and config.json's together
    special_ids     ids that `skip_special_tokens` leaves out
    special_tokens  text of each named token ("bos_token", "eos_token" …), the variables of chat templates
    templates       chat templates by name; a single one is called "default"
    byte_level      True where tokens are spelled in the byte-level alphabet, so that text is their bytes in a row
    byte_ids        ids of the `<0xNN>` tokens, where the decoder turns runs of them into characters
    """

    def __init__(
        self,
        backend: Backend,
        decoder: Mapping[str, Any] | None,
        *,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int],
        templates: Mapping[str, str],
    ):
        """`decoder` is the "decoder" section of tokenizer.json: the library does not show what it has parsed."""
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens = dict(special_tokens)
        self.templates = dict(templates)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self.token_id(special_tokens.get("bos_token", ""))
        eos_id = self.token_id(special_tokens.get("eos_token", ""))
        self.eos_ids = frozenset(eos_ids) | (set() if eos_id is None else {eos_id})
        steps = list(_steps(decoder))
        kinds = {step.get("type") for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self._replacements = [pair for step in steps for pair in _replacement(step)]
        byte_ids = (self.token_id(f"<0x{value:02X}>") for value in range(256)) if "ByteFallback" in kinds else ()
        self.byte_ids = frozenset(token_id for token_id in byte_ids if token_id is not None)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads the tokenizer in folder `path`. Raises CheckpointError, naming the file and what to do about it."""
        present = _list(path)
        if "tokenizer.json" not in present:
            raise CheckpointError(_nothing_to_load(path, present))
        source = _read(path / "tokenizer.json")
        spec = _parse(source, path / "tokenizer.json")
        config, names, generation, model = (
            _parse(_read(path / name), path / name) if name in present else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
        )
        declared = {**names, **{key: value for key, value in config.items() if value is not None}}
        backend = _backend(source, path / "tokenizer.json")
        try:
            _add_declared(backend, declared)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'} declares tokens in no known form: {error}"
            ) from error
        # Either would cut or lengthen prompts behind the caller's back; transformers turns them off as well.
        backend.no_truncation()
        backend.no_padding()
        eos_ids = _eos_ids(generation, path / "generation_config.json") | _eos_ids(model, path / "config.json")
        templates = {**_declared_templates(config, path / "tokenizer_config.json"), **_template_files(path, present)}
        return cls(
            backend, spec.get("decoder"), special_tokens=_named_tokens(declared), eos_ids=eos_ids, templates=templates
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, None where there is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; `add_special_tokens` runs the checkpoint's post-processor (bos where it says so).

        Raises ValueError on text that UTF-8 cannot hold (an unpaired surrogate, which JSON can smuggle in).
        """
        return list(self._encoding(text, add_special_tokens).ids)

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[str], list[tuple[int, int]]]:
        """Ids, the text of each, and each one's (start, end) in characters of `text`. Raises as `encode`."""
        encoding = self._encoding(text, add_special_tokens)
        ids = list(encoding.ids)
        return ids, [self.token_text(token_id) for token_id in ids], list(encoding.offsets)

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # what the library says to a str that has no UTF-8
            raise ValueError("the text holds an unpaired surrogate, which UTF-8 cannot express") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary have none."""
        if not self.byte_level:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        # The library would put added tokens ("café") through the byte alphabet and spoil them.
        hidden = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD where a token is only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds to running text; a special token's own name; empty outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # not remembered: a client may name any number of such ids
        return self._bytes.setdefault(token_id, self._spelled(token_id, token))

    def _spelled(self, token_id: int, token: str) -> bytes:
        if token_id in self.special_ids or (self.byte_level and token_id in self._added_ids):
            return token.encode()
        if self.byte_level:
            return _from_byte_alphabet(token)
        if token_id in self.byte_ids and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()


def _list(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"cannot read the tokenizer's folder {path}: {error.strerror}; set TOKENIZER_PATH (or CHECKPOINT_PATH) "
            "to a folder that holds tokenizer.json"
        ) from error


def _nothing_to_load(path: Path, present: set[str]) -> str:
    found = "only the sentencepiece file tokenizer.model" if "tokenizer.model" in present else "no tokenizer.json"
    return (
        f"{path} has {found}; set TOKENIZER_PATH to a folder that holds tokenizer.json, or write one where "
        f"transformers is installed: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    )


def _read(path: Path) -> str:
    try:
        return files.read(path, _MAX_FILE_BYTES).decode()
    except files.NotRegularFileError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check that this user may read it") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); copy the file again") from error


def _parse(source: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(source)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); copy it again, it may be cut short or a Git LFS pointer"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; copy it again")
    return value


def _backend(source: str, path: Path) -> Backend:
    try:
        return Backend.from_str(source)
    except Exception as error:  # the library raises the bare class for whatever it cannot use
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}; copy it again") from error


def _content(token: object) -> str | None:
    """The text of a token as configs write it: a str, or an object with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _named_tokens(declared: Mapping[str, Any]) -> dict[str, str]:
    """Every `…_token` with a text, the well-known ones first (a bool such as add_bos_token has none)."""
    keys = [*_NAMED_TOKENS, *(key for key in declared if key.endswith("_token") and key not in _NAMED_TOKENS)]
    return {key: text for key in keys if (text := _content(declared.get(key))) is not None}


def _as_added(token: object) -> AddedToken:
    flags = {key: token[key] for key in _TOKEN_FLAGS if key in token} if isinstance(token, dict) else {}
    return AddedToken(_content(token) or "", **{"special": True, **flags})


def _add_declared(backend: Backend, declared: Mapping[str, Any]) -> None:
    """Adds the tokens that only tokenizer_config.json knows, in the order in which `AutoTokenizer` would."""
    by_id = (declared.get("added_tokens_decoder") or {}).items()
    backend.add_tokens([_as_added(token) for _, token in sorted(by_id, key=lambda item: int(item[0]))])
    more = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    extra = list(more.values()) if isinstance(more, dict) else list(more)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    wanted = [declared[key] for key in _named_tokens(declared)] + extra
    backend.add_tokens([_as_added(token) for token in wanted if _content(token) not in known])


def _eos_ids(config: Mapping[str, Any], path: Path) -> set[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return set(ids)


def _declared_templates(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    value = config.get("chat_template")
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value or []
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in entries}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f'{path}: chat_template must be a string or a list of {{"name": …, "template": …}}'
        ) from error


def _template_files(path: Path, present: set[str]) -> dict[str, str]:
    """chat_template.jinja and its named siblings, which go before tokenizer_config.json's."""
    found = {"default": path / "chat_template.jinja"} if "chat_template.jinja" in present else {}
    found |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    return {name: _read(file) for name, file in found.items()}


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A decoder's steps in order, nested sequences opened."""
    if decoder is None:
        return
    if decoder.get("type") != "Sequence":
        yield decoder
    for step in decoder.get("decoders", ()):
        yield from _steps(step)


def _replacement(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a step puts in the place of sentencepiece's ▁ (or of any other fixed string), if that is what it does."""
    if step.get("type") == "Metaspace":
        return [(step.get("replacement", "▁"), " ")]
    pattern = step.get("pattern") or {}
    return [(pattern["String"], step["content"])] if step.get("type") == "Replace" and "String" in pattern else []


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 upwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(token: str) -> bytes:
    """A token with a character outside the alphabet stands for its own text, as in the library's decoder."""
    values = [_BYTE_ALPHABET.get(character) for character in token]
    known = [value for value in values if value is not None]
    return bytes(known) if len(known) == len(values) else token.encode()
