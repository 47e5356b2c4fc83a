"""Encodes text to token ids and decodes them, with the `tokenizer.json` of a checkpoint.

Reads the same files as transformers' `AutoTokenizer` and returns the same ids, but does not import transformers.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from rtp_llm import files
from rtp_llm.errors import CheckpointError

# In the order in which `AutoTokenizer` adds special tokens that tokenizer.json lacks, so that their ids are the same.
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json files have about 35 MB
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
SURROGATE_MESSAGE = "the text has an unpaired surrogate, which UTF-8 cannot represent"
PIECE_CHARACTERS = 1 << 16  # of the pieces in which `min_tokens` encodes a long text
CUT_TOKENS = 64
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One checkpoint's tokenizer. Thread-safe, since it does not change after loading.

    vocab_size      number of ids, including added tokens; the model's embedding may have more or fewer rows
    eos_ids         ids that end a response: those of the tokenizer, generation_config.json and config.json
    added_tokens    {id: token} of the added tokens, which are matched in a text before the pre-tokenizer splits it
    special_ids     ids that `skip_special_tokens` omits
    special_tokens  text of each named token ("bos_token", "eos_token" …), the variables of chat templates
    templates       chat templates by name; a single one is called "default"
    byte_level      True if tokens use the byte-level alphabet, so that the text is the concatenation of their bytes
    byte_ids        ids of the `<0xNN>` tokens, which the decoder combines to characters; often empty
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int],
        templates: Mapping[str, str],
    ):
        self._backend = backend
        self._path: Path | None = None  # if it was read from files
        self._bytes: dict[int, bytes] = {}
        self.added_tokens = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in self.added_tokens.items() if token.special)
        self.special_tokens = dict(special_tokens)
        self.templates = dict(templates)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        bos_id = self.token_id(special_tokens.get("bos_token", ""))
        self._added_bos_id = bos_id if bos_id in backend.encode("").ids else None
        eos_id = self.token_id(special_tokens.get("eos_token", ""))
        self.eos_ids = frozenset(eos_ids) | (set() if eos_id is None else {eos_id})
        # The state of a decoder is its section of tokenizer.json.
        steps = list(_decoder_steps(json.loads(backend.decoder.__getstate__()) if backend.decoder else None))
        step_types = {step.get("type") for step in steps}
        self.byte_level = "ByteLevel" in step_types
        self._replacements = [pair for step in steps for pair in _replacements_of_step(step)]
        has_byte_fallback = "ByteFallback" in step_types
        byte_ids = (self.token_id(f"<0x{value:02X}>") for value in range(256)) if has_byte_fallback else ()
        self.byte_ids = frozenset(token_id for token_id in byte_ids if token_id is not None)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads the tokenizer in the directory `path`. Raises CheckpointError, which names the file and a fix."""
        file_names = _list_files(path)
        if "tokenizer.json" not in file_names:
            raise CheckpointError(_missing_file_message(path, file_names))
        backend = _backend(_read_text(path / "tokenizer.json"), path / "tokenizer.json")
        config, special_tokens_map, generation_config, model_config = (
            _parse_json(_read_text(path / name), path / name) if name in file_names else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
        )
        declared = {**special_tokens_map, **{key: value for key, value in config.items() if value is not None}}
        try:
            _add_declared(backend, declared)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'} declares tokens in an unknown format: {error}; copy the file again"
            ) from error
        # tokenizer.json may enable truncation and padding; transformers disables both as well.
        backend.no_truncation()
        backend.no_padding()
        eos_ids = _eos_ids(generation_config, path / "generation_config.json")
        eos_ids |= _eos_ids(model_config, path / "config.json")
        templates = {**_declared_templates(config, path / "tokenizer_config.json"), **_template_files(path, file_names)}
        tokenizer = cls(backend, special_tokens=_named_tokens(declared), eos_ids=eos_ids, templates=templates)
        tokenizer._path = path
        return tokenizer

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Lets another process read the files itself: to pickle a vocabulary holds the GIL for long."""
        return (Tokenizer.load, (self._path,)) if self._path else super().__reduce__()

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json with all tokens, including those that only other files declare."""
        return self._backend.to_str()

    def split_markers(self, text: str) -> list[str | int]:
        """Splits a text into the ids of markers and the strings between them.

        Markers are the special tokens and all added tokens in angle brackets, as llguidance defines them.
        """
        ids = {
            token.content: token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }
        pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if ids else [text]
        return [ids.get(part, part) for part in parts if part]

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token of the vocabulary; None if it does not exist."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of `text`. `add_special_tokens`: run the checkpoint's post-processor, which may add bos.

        Raises ValueError if `text` has an unpaired surrogate, which JSON can represent but UTF-8 cannot.
        """
        try:
            # As a batch of one: `encode` holds the GIL, this one does not. It computes no offsets, which take longest.
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError as error:  # raised for a str that cannot be encoded as UTF-8
            raise ValueError(SURROGATE_MESSAGE) from error

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a rendered prompt. Adds the checkpoint's bos token unless `text` begins with it."""
        ids = self.encode(text)
        return ids[1:] if self._has_two_bos(ids) else ids

    def _has_two_bos(self, ids: Sequence[int]) -> bool:
        return len(ids) > 1 and ids[0] == ids[1] == self._added_bos_id

    def is_word(self, token: str) -> bool:
        """Returns whether `token` is in the vocabulary of tokenizer.json's model (such as BPE), so that plain text can
        be encoded as it. A token that is only an added token is not.
        """
        return self._backend.model.token_to_id(token) is not None

    def normalize(self, text: str) -> str:
        """Returns the text as the normalizer of tokenizer.json changes it, for example to Unicode's NFC; unchanged if
        there is no normalizer. Unpaired surrogates become question marks first.
        """
        if self._backend.normalizer is None:
            return text
        return str(self._backend.normalizer.normalize_str(text.encode(errors="replace").decode()))

    def renamed(self, names: Mapping[str, str]) -> Callable[[str], list[int]]:
        """Returns a function that encodes text like this tokenizer, but knows some added tokens under other names.

        names  {added token: its new name}. The new name in a text becomes the added token's id, and the original name
               becomes plain text. If the ids of that plain text would contain the id of a renamed token (the vocabulary
               has it as an ordinary token too), the list has -1 in its place.

        So a caller can tell a control token from the same characters in a client's text. The function adds no special
        tokens such as bos. It shares the vocabulary of this tokenizer, so it needs little memory.
        """
        backend = Backend(self._backend.model)
        if self._backend.normalizer is not None:
            backend.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            backend.pre_tokenizer = self._backend.pre_tokenizer
        added = dict(sorted(self.added_tokens.items()))
        contents = {token_id: names.get(token.content, token.content) for token_id, token in added.items()}
        backend.add_tokens(
            [AddedToken(contents[i], **{f: getattr(token, f) for f in _TOKEN_FLAGS}) for i, token in added.items()]
        )
        original_ids: dict[int | None, int] = {i: -1 for i, token in added.items() if token.content in names}
        original_ids |= {backend.token_to_id(content): token_id for token_id, content in contents.items()}

        def encode(text: str) -> list[int]:
            [encoding] = backend.encode_batch_fast([text], add_special_tokens=False)
            return [original_ids.get(token_id, token_id) for token_id in encoding.ids]

        return encode

    @cached_property
    def _longest_token(self) -> int:
        """The length of the longest token; in bytes with the byte-level alphabet, where each character is a byte."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def min_tokens(self, text: str, enough: int) -> int:
        """Returns a lower bound for the number of tokens of `text`; stops counting once it exceeds `enough`.

        So a caller can refuse a very long text without encoding all of it, which would take gigabytes. Returns 0 for a
        text short enough to encode as a whole. First divides the length of the text by that of the longest token, if
        the tokenizer is byte-level without a normalizer. If that is not more than `enough`, encodes the text in pieces
        of `PIECE_CHARACTERS`; a cut can add a few tokens, so `CUT_TOKENS` are subtracted for each piece.
        """
        if len(text) <= PIECE_CHARACTERS:
            return 0
        # Only a byte-level tokenizer keeps the length: others may fuse unknown characters to one token.
        total = len(text) // self._longest_token if self.byte_level and self._backend.normalizer is None else 0
        if total > enough:
            return total
        total = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            num_tokens = len(self.encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False))
            total += max(0, num_tokens - CUT_TOKENS)
            if total > enough:
                break
        return total

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[str], list[tuple[int, int]]]:
        """Returns three lists with an item per token of a rendered prompt: its id, its text, and its (start, end) in
        characters of `text`. Raises ValueError if `text` has an unpaired surrogate.
        """
        encoding = self._encoding(text, add_special_tokens)
        start = int(self._has_two_bos(encoding.ids))
        ids = encoding.ids[start:]
        return ids, [self.token_text(token_id) for token_id in ids], encoding.offsets[start:]

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except TypeError as error:  # raised for a str that cannot be encoded as UTF-8
            raise ValueError(SURROGATE_MESSAGE) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`. Ignores ids outside the vocabulary."""
        if not self.byte_level:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        # The backend would decode added tokens ("café") with the byte alphabet, which is wrong.
        skipped_ids = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped_ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """Returns `token_bytes` as text, with U+FFFD for incomplete characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes that a token adds to a text; a special token's name; b"" for an unknown id."""
        cached = self._bytes.get(token_id)
        if cached is not None:
            return cached
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # not cached, since clients may send any number of such ids
        return self._bytes.setdefault(token_id, self._compute_token_bytes(token_id, token))

    def _compute_token_bytes(self, token_id: int, token: str) -> bytes:
        if token_id in self.special_ids or (self.byte_level and token_id in self.added_tokens):
            return token.encode()
        if self.byte_level:
            return _from_byte_alphabet(token)
        if token_id in self.byte_ids and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()


def _list_files(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"cannot read the tokenizer's folder {path}: {error.strerror}; set TOKENIZER_PATH (or CHECKPOINT_PATH) "
            "to a folder that holds tokenizer.json"
        ) from error


def _missing_file_message(path: Path, file_names: set[str]) -> str:
    has_model = "tokenizer.model" in file_names
    content = "only the sentencepiece file tokenizer.model" if has_model else "no tokenizer.json"
    return (
        f"{path} has {content}; set TOKENIZER_PATH to a folder that holds tokenizer.json, or write one where "
        f"transformers is installed: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    )


def _read_text(path: Path) -> str:
    try:
        return files.read(path, _MAX_FILE_BYTES).decode()
    except files.NotRegularFileError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check that this user may read it") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); copy the file again") from error


def _parse_json(source: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(source)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); copy the file again; it may be truncated or a Git LFS pointer"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; copy the file again")
    return value


def _backend(source: str, path: Path) -> Backend:
    try:
        return Backend.from_str(source)
    except Exception as error:  # the backend raises plain Exception for every error
        _parse_json(source, path)  # names the place of an error in the JSON
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}; copy the file again") from error


def _token_content(token: object) -> str | None:
    """Returns the text of a token from a config file; None if it has none.

    `token` is the text itself, or an object with the text as "content" and the token's flags.
    """
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _named_tokens(declared: Mapping[str, Any]) -> dict[str, str]:
    """Returns {key: text} of all keys `…_token` whose value is a token, the well-known keys first."""
    keys = [
        *_SPECIAL_TOKEN_NAMES,
        *(key for key in declared if key.endswith("_token") and key not in _SPECIAL_TOKEN_NAMES),
    ]
    return {key: text for key in keys if (text := _token_content(declared.get(key))) is not None}


def _added_token(token: object) -> AddedToken:
    flags = {key: token[key] for key in _TOKEN_FLAGS if key in token} if isinstance(token, dict) else {}
    return AddedToken(_token_content(token) or "", **{"special": True, **flags})


def _add_declared(backend: Backend, declared: Mapping[str, Any]) -> None:
    """Adds the tokens that tokenizer.json lacks and other config files declare, in the order of `AutoTokenizer`."""
    by_id = (declared.get("added_tokens_decoder") or {}).items()
    backend.add_tokens([_added_token(token) for _, token in sorted(by_id, key=lambda item: int(item[0]))])
    extra = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    extra_tokens = list(extra.values()) if isinstance(extra, dict) else list(extra)
    existing = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = [declared[key] for key in _named_tokens(declared)] + extra_tokens
    backend.add_tokens([_added_token(token) for token in tokens if _token_content(token) not in existing])


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


def _template_files(path: Path, file_names: set[str]) -> dict[str, str]:
    """Returns {name: template} from chat_template.jinja and the folder additional_chat_templates.

    These templates override those of tokenizer_config.json.
    """
    paths = {"default": path / "chat_template.jinja"} if "chat_template.jinja" in file_names else {}
    paths |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    return {name: _read_text(file) for name, file in paths.items()}


def _decoder_steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of tokenizer.json's "decoder" in order, with nested sequences flattened."""
    if decoder is None:
        return
    if decoder.get("type") != "Sequence":
        yield decoder
    for step in decoder.get("decoders", ()):
        yield from _decoder_steps(step)


def _replacements_of_step(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (text, its replacement) of a decoder step that replaces text, such as sentencepiece's ▁ by a space."""
    if step.get("type") == "Metaspace":
        return [(step.get("replacement", "▁"), " ")]
    pattern = step.get("pattern") or {}
    return [(pattern["String"], step["content"])] if step.get("type") == "Replace" and "String" in pattern else []


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's alphabet, {character: byte}: printable Latin-1 is itself, others are from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(unprintable)}


_BYTE_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(token: str) -> bytes:
    """Returns the bytes of a token in GPT-2's byte alphabet.

    A token with a character outside that alphabet is literal text, as in the decoder of the tokenizers library.
    """
    values = [_BYTE_ALPHABET.get(character) for character in token]
    bytes_in_alphabet = [value for value in values if value is not None]
    return bytes(bytes_in_alphabet) if len(bytes_in_alphabet) == len(values) else token.encode()
