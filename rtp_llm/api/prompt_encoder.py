"""Tokenizes the prompts of requests. Rejects a text that is certainly too long without tokenizing it."""

from collections.abc import Iterable

from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.errors import empty_prompt, invalid_format, long_prompt
from rtp_llm.text.template import ChatTemplate, Prompt
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.truncation import encode_truncated

MAX_COUNTED_TOKENS = 1 << 18  # of a text for /tokenize, where the model's limit is lower


class PromptEncoder:
    """Turns texts, rendered chats and token ids into prompts within the limits. All methods raise RequestError 400."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template

    def encode_chat(self, prompt: Prompt, limits: PromptLimits, last: int | None = None) -> list[int]:
        """Returns the token ids of a rendered chat; only the `last` ones unless that is None. Raises RequestError 400
        if they exceed the `limits`.
        """
        self._check_text(prompt.text, limits, last)
        return limits.checked(_tail(self._template.encode(prompt), last))

    def encode_prompt(self, prompt: str | list[int], limits: PromptLimits, last: int | None = None) -> list[int]:
        """Returns the token ids of a prompt, which is a text or token ids; only the `last` ones unless that is None.
        Raises RequestError 400 if they exceed the `limits`.
        """
        if isinstance(prompt, list):
            return limits.checked(_tail(prompt, last))
        self._check_text(prompt, limits, last)
        return limits.checked(_tail(self._tokenizer.encode_prompt(prompt), last))

    def encode_input(self, item: str | list[int], limits: PromptLimits, truncate: int | None = None) -> list[int]:
        """Returns the token ids of an input to an embedding model, which is a text or token ids.

        truncate: maximum number of tokens to keep, including special tokens; None: all; -1: as many as fit.
        """
        if truncate is None or not item:
            return self.encode_prompt(item, limits)
        longest = limits.max_seq_len - 1
        max_tokens = longest if truncate == -1 else min(truncate, longest)
        if isinstance(item, list):
            return limits.checked(item[:max_tokens])
        _check_unicode(item)
        return limits.checked(encode_truncated(self._tokenizer, item, max_tokens))

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a client's text that becomes part of a prompt. Control tokens that it spells, such
        as <|im_start|>, are encoded as plain text.
        """
        _check_unicode(text)
        return self._template.encode_text(text)

    def encode_bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Returns sequences of token ids that must not occur in the output: for each word, its ids at the start of a
        text and its ids after a space. Leaves out the latter if they end with the former, which then forbid both.
        """
        found: list[tuple[int, ...]] = []
        for word in words:
            _check_unicode(word)
            bare = word.lstrip() or word
            alone, later = (
                tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")
            )
            found += [alone] if later[-len(alone) :] == alone else [alone, later]
        return tuple(found)

    def check_countable(self, text: str, limits: PromptLimits) -> None:
        """Raises RequestError 400 if a text is not valid Unicode, or certainly has more tokens than endpoints that only
        tokenize accept: the model's limit, at least MAX_COUNTED_TOKENS.
        """
        _check_unicode(text)
        limit = max(MAX_COUNTED_TOKENS, limits.max_seq_len)
        num_tokens = self._tokenizer.min_tokens(text, limit)
        if num_tokens > limit:
            raise long_prompt(f"the text has at least {num_tokens} tokens; this route encodes at most {limit}")

    def _check_text(self, text: str, limits: PromptLimits, last: int | None) -> None:
        """Raises RequestError 400 if a text is empty, not Unicode or certainly too long.

        last: as many of its tokens are read; None: all.
        """
        if not text:
            raise empty_prompt(param=limits.prompt_field)
        if last is not None:
            return self.check_countable(text, limits)
        _check_unicode(text)
        limits.check_length(self._tokenizer.min_tokens(text, limits.max_seq_len), prefix="at least ")


def _tail(ids: list[int], last: int | None) -> list[int]:
    return ids if last is None else ids[-last:]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text has an unpaired surrogate at character {error.start}: not valid Unicode"
        raise invalid_format(message) from None
