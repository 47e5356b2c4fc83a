"""A model folder whose tokens are bytes: every test text has a spelling that no tokenizer's training can change.

There are no weights: it is served by `fake_engine`, which plays tokens from a script. A character of more than one byte
is more than one token, so every such text is a test of half characters.
"""

import json
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
    """The folder, and its tokens by the bytes they stand for."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(_backend().to_str())
        config = {"eos_token": END, "chat_template": TEMPLATE, "model_max_length": 2048}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        tokenizer = self.tokenizer
        return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}

    @property
    def end(self) -> int:
        """The end-of-sequence token."""
        return self._ids[END.encode()]

    def tokens(self, text: str | bytes) -> list[int]:
        """One token per byte; bytes may also be what is no UTF-8."""
        raw = text.encode() if isinstance(text, str) else text
        return [self._ids[bytes([value])] for value in raw]


def _backend() -> Backend:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END, TURN])
    return made
