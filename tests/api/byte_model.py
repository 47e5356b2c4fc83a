"""A model directory with one token per byte, so that the tokens of a text are known.

It has no weights: `fake_engine` sends tokens from a script. A character of several bytes is several tokens, so such
texts test incomplete characters.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from rtp_llm.text.tokenizer import Tokenizer

END, TURN = "<|end|>", "<|turn|>"
TEMPLATE = (
    "{%- for message in messages -%}<|turn|>{{ message.role }}:{{ message.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|turn|>assistant:{%- endif -%}"
)


class ByteModel:
    """A model directory whose tokens are single bytes, and a function that converts text to these tokens."""

    def __init__(self, directory: Path, template: str = TEMPLATE, markers: Sequence[str] = ()):
        """`markers`: further special tokens."""
        self.directory, self._markers = directory, markers
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(_backend(markers).to_str())
        config = {"eos_token": END, "chat_template": template, "model_max_length": 2048}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        tokenizer = self.tokenizer
        return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}

    @property
    def end(self) -> int:
        """The end-of-sequence token."""
        return self._ids[END.encode()]

    def tokens(self, text: str | bytes) -> list[int]:
        """Returns a token per marker and per other byte; `bytes` need not be valid UTF-8."""
        raw = text.encode() if isinstance(text, str) else text
        markers = b"|".join(re.escape(marker.encode()) for marker in self._markers)
        return [self._ids[token] for token in re.findall(markers + b"|." if markers else b".", raw, re.DOTALL)]


def _backend(markers: Sequence[str]) -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, TURN, *markers])
    return backend
