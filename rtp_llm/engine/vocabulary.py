"""The model's vocabulary in the form that llguidance needs, read once per process."""

import logging
import time
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from threading import Thread

from llguidance import LLTokenizer

from rtp_llm.config import Config
from rtp_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def open_vocabulary(config: Config, vocab_size: int, delay: float = 0.0) -> "Future[LLTokenizer]":
    """Starts to read the model's tokenizer for grammars after `delay` seconds, once per process. Returns a future of
    the vocabulary.

    `vocab_size`: the model's number of token ids; a grammar never allows ids that the tokenizer lacks. Reading 150,000
    tokens takes a second, in which the process does little else, and 120 MB of memory.
    """
    return _start_to_read(Path(config.tokenizer_path or config.checkpoint_path), vocab_size, delay)


@cache
def _start_to_read(path: Path, vocab_size: int, delay: float) -> "Future[LLTokenizer]":
    future: Future[LLTokenizer] = Future()

    def read() -> None:
        time.sleep(delay)
        started_at = time.monotonic()
        try:
            future.set_result(_read(path, vocab_size))
            log.info("structured output: read the tokenizer in %.1f s", time.monotonic() - started_at)
        except BaseException as error:  # a panic of llguidance is no Exception
            log.warning("structured output is not available, requests for it will be rejected: %s", error)
            future.set_exception(ValueError(f"this model's tokenizer does not support grammars: {error}"))

    Thread(target=read, name="vocabulary", daemon=True).start()
    return future


def _read(path: Path, vocab_size: int) -> LLTokenizer:
    tokenizer = Tokenizer.load(path)
    num_ids = max(vocab_size, tokenizer.vocab_size)
    eos_ids = sorted(token_id for token_id in tokenizer.eos_ids if token_id < tokenizer.vocab_size)
    return LLTokenizer(tokenizer.to_json(), n_vocab=num_ids, eos_token=eos_ids or None)
