"""Encodes only the first tokens of a text, which may be much longer than the model can read."""

from collections.abc import Callable
from functools import partial

from rtp_llm.text.tokenizer import CUT_TOKENS, Tokenizer


def encode_truncated(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
    """Returns at most `max_tokens` ids: the start of the text with all special tokens of the checkpoint's
    post-processor, even those at the end, since an embedding is the hidden state of the last token.
    """
    before, after = _special_tokens(tokenizer)
    room = max(0, max_tokens - len(before) - len(after))
    return [*before, *encode_start(partial(tokenizer.encode, add_special_tokens=False), text, room), *after][
        :max_tokens
    ]


def encode_start(encode: Callable[[str], list[int]], text: str, max_tokens: int) -> list[int]:
    """Returns the first `max_tokens` ids of a text. Encodes little more of the text than needed."""
    size = 8 * max_tokens
    while True:
        ids = encode(text[:size])
        # The last tokens before a cut can differ from those of the whole text.
        if size >= len(text) or len(ids) >= max_tokens + CUT_TOKENS:
            return ids[:max_tokens]
        size = max(4 * size, CUT_TOKENS)


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that the checkpoint's post-processor adds before and after the ids of a text."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]
