"""Writes the tokenizer files of small checkpoints in the style of well-known families."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend


def write(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value), encoding="utf-8")


def declare(directory: Path, token: str) -> None:
    """Adds a special token that only tokenizer_config.json declares."""
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(directory, "tokenizer_config.json", {**config, "extra_special_tokens": [token]})


def qwen_like(directory: Path) -> Path:
    """Byte-level BPE, NFC, Qwen's pre-tokenization; one token that only tokenizer_config.json declares."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("Ã", "©"), ("ä", "\u00b8")]
    vocab = {token: n for n, token in enumerate([*characters, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    words = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(t, special=False) for t in ("<tool_call>", "</tool_call>")])
    backend.enable_truncation(3)  # some checkpoints enable it; prompts must not be truncated
    backend.save(str(directory / "tokenizer.json"))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        n: {**flags, "content": t.content, "special": t.special} for n, t in backend.get_added_tokens_decoder().items()
    }
    added[len(vocab) + 5] = {**flags, "content": "<extra>", "special": False, "lstrip": True}
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "[PAD]", "special": True},
        "added_tokens_decoder": added,
    }
    write(directory, "tokenizer_config.json", config)
    write(directory, "config.json", {"model_type": "qwen2", "eos_token_id": 7})
    write(directory, "generation_config.json", {"eos_token_id": [len(vocab) + 2, len(vocab)]})
    return directory


def llama_like(directory: Path, *, bos: bool = True, legacy: bool = False) -> Path:
    """Sentencepiece-style BPE with byte fallback; the post-processor adds `bos`, as for Llama."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{value:02X}>": value + 3 for value in range(256)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("▁", "▁")]
    for token in [*"▁abcdefghijklmnopqrstuvwxyz0123456789.,'[]<>|_é中", *(a + b for a, b in merges)]:
        vocab.setdefault(token, len(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1, right=0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    single = "<s> $A" if bos else "$A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)] if bos else [])
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    # add_bos_token contradicts the post-processor, which has priority.
    tokenizer_class = "PreTrainedTokenizerFast" if legacy else "LlamaTokenizer"
    write(directory, "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "add_bos_token": not bos})
    write(directory, "special_tokens_map.json", names)
    write(directory, "config.json", {"model_type": "llama"})
    return directory


FAMILIES = {
    "qwen": qwen_like,
    "llama": llama_like,
    "llama-no-bos": lambda directory: llama_like(directory, bos=False),
    "llama-legacy": lambda directory: llama_like(directory, legacy=True),
}
