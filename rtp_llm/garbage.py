"""Keeps Python's garbage collector from searching what stays: modules, parsed files, a loaded server.

Each search walks all objects that it has not yet found to be old. It takes a quarter of the import of torch, and half
of the parse of a large tokenizer.json.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Creates objects without searches for garbage. Reference counts free objects meanwhile, but no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def keep_all() -> None:
    """Exempts all objects that exist from later searches, so that none of these delays a step or a request for long."""
    gc.freeze()
