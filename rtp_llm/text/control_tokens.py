"""Encodes control tokens that clients spell in messages, such as `<|im_end|>`, as plain text. Only the chat template
may write control tokens.

Before the template renders, a random mark is inserted into every control token that a string of the messages contains,
and at the end of a string that could form one together with the next string. The rendered text is then cut at the
marks. No control token can span a cut, so those that remain in the pieces are the template's.
"""

import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tokenizers import AddedToken

from rtp_llm.text.tokenizer import Tokenizer

MARK_DIGITS = 20


def new_mark() -> str:
    """Returns a mark, a text that ControlTokens inserts into texts of clients to break control tokens: random digits,
    which clients cannot guess and which the filters of a template do not change.

    Only its first digit is 0, so a mark cannot overlap another one or itself.
    """
    return "0" + "".join(secrets.choice("123456789") for _ in range(MARK_DIGITS - 1))


class ControlTokens:
    """Finds control tokens in clients' texts and encodes them as plain text. `templates`: sources of chat templates.

    Control tokens are the tokenizer's special tokens, and its added tokens such as `<tool_call>` (not special in Qwen's
    tokenizers) that occur in the source of a chat template. In assistant messages, only the special tokens become plain
    text: a client receives tags such as `<tool_call>` as text in a response and sends them back in the next request,
    but it never receives the text of a special token.
    """

    def __init__(self, tokenizer: Tokenizer, templates: Collection[str]):
        tokens = [token for token in tokenizer.added_tokens.values() if _may_control(token)]
        special = {token.content for token in tokens if token.special}
        written = {token.content for token in tokens if any(token.content in source for source in templates)}
        # A control token can also arise from other text, if it is searched for after normalization or is a word, too.
        control = [token for token in tokens if token.content in special | written]
        arises = any(token.normalized or tokenizer.is_word(token.content) for token in control)
        normalize = tokenizer.normalize if arises else str
        self._in_messages, self._in_answers = _Spellings(special | written, normalize), _Spellings(special, normalize)
        self._names = {token.content: f"{new_mark()};" for token in control}
        longest_first = sorted(map(re.escape, self._names), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first) or "(?!)")
        self._ids = frozenset(token_id for token_id, t in tokenizer.added_tokens.items() if t.content in self._names)
        self._encode, self._encode_renamed = tokenizer.encode, tokenizer.renamed(self._names)

    def marked(self, value: Any, mark: str, *, is_answer: bool = False) -> Any:
        """Returns the JSON value with `mark` inserted into the control tokens that its strings and keys contain, so
        that they have no effect.

        `is_answer`: the strings are from an assistant message, in which special tokens lose their effect, but not tags
        such as `<tool_call>`.
        """
        return (self._in_answers if is_answer else self._in_messages).marked(value, mark)

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Returns the token ids of the concatenated pieces. The text of a control token becomes the control token if it
        lies within one piece, and plain text if it spans two.
        """
        if len(pieces) == 1:
            return self._encode(pieces[0], add_special_tokens=False)
        # With the whole text, words at the cuts are encoded as if there were none.
        ids = self._encode_renamed("".join(self._pattern.sub(lambda m: self._names[m[0]], piece) for piece in pieces))
        if -1 not in ids:
            return ids
        # This vocabulary has a control token as a word, too, which it cannot find where it is cut.
        return [token_id for piece in pieces for token_id in self._encode(piece, add_special_tokens=False)]


class _Spellings:
    """Finds some tokens in strings and in their normalized forms (`normalize`)."""

    def __init__(self, tokens: Collection[str], normalize: Callable[[str], str]):
        rests: defaultdict[str, list[str]] = defaultdict(list)
        for token in tokens:
            rests[token[0]].append(re.escape(token[1:]))
        alternatives = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        self._first_character = re.compile("|".join(alternatives) or "(?!)")
        self._heads = {token[:length] for token in tokens for length in range(1, len(token))}
        self._tails = {token[length:] for token in tokens for length in range(1, len(token))}
        self._first, self._last = {token[0] for token in tokens}, {token[-1] for token in tokens}
        edges = sorted(map(re.escape, self._first | self._last))
        self._edge = re.compile(
            "|".join(edges) or "(?!)"
        )  # occurs in every token and in every part at its start or end
        self._longest = max(map(len, tokens), default=1)
        self._normalize = normalize

    def marked(self, value: Any, mark: str) -> Any:
        holder = [value]
        pending: list[Any] = [
            holder
        ]  # copies whose items are still those of the client; no recursion: they nest deeply
        while pending:
            container = pending.pop()
            for key, item in list(container.items() if isinstance(container, dict) else enumerate(container)):
                if isinstance(item, str):
                    container[key] = self._marked_text(item, mark)
                elif isinstance(item, dict):
                    container[key] = {self._marked_text(name, mark): member for name, member in item.items()}
                    pending.append(container[key])
                elif isinstance(item, list):
                    container[key] = list(item)
                    pending.append(container[key])
        return holder[0]

    def _marked_text(self, text: str, mark: str) -> str:
        marked = text
        if self._edge.search(text):
            marked = self._first_character.sub(lambda match: match[0] + mark, text)
            # Templates strip white space, so the marks at the ends of a string stand within it.
            if self._ends_in_head(text):
                marked = marked.rstrip() + mark + text[len(text.rstrip()) :]
            if self._begins_in_tail(text):
                marked = text[: len(text) - len(text.lstrip())] + mark + marked.lstrip()
        if any(self._arises_in(piece) for piece in marked.split(mark)):
            words = text.strip()  # a token has no known place in them, so they are cut at every character
            return text.replace(words, mark + mark.join(words) + mark, 1)
        return marked

    def _arises_in(self, text: str) -> bool:
        """Returns whether the normalized form of `text` contains a token that `text` itself does not."""
        normalized = self._normalize(text)
        if normalized == text:
            return False
        is_spelled = self._first_character.search(normalized) is not None
        return is_spelled or self._ends_in_head(normalized) or self._begins_in_tail(normalized)

    def _ends_in_head(self, text: str) -> bool:
        end = text.rstrip()[-self._longest :]
        return any(end[i:] in self._heads for i, character in enumerate(end) if character in self._first)

    def _begins_in_tail(self, text: str) -> bool:
        start = text.lstrip()[: self._longest]
        return any(start[: i + 1] in self._tails for i, character in enumerate(start) if character in self._last)


def _may_control(token: AddedToken) -> bool:
    """Returns whether an added token can be a control token: it is special, or a tag such as `<think>` and not a word.

    Tokens that are found only between other words are left out, since `ControlTokens` looks at the spelling alone.
    """
    content = token.content
    is_tag = any(map(str.isalnum, content)) and not content[0].isalnum() and not content[-1].isalnum()
    return len(content) > 1 and not content.isspace() and not token.single_word and (token.special or is_tag)
