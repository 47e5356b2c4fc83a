"""Other people's processes, as they may be shown."""

from collections.abc import Sequence
from itertools import takewhile

LONGEST = 80


def shown(command: Sequence[str]) -> str:
    """A command line without its options, whose values may be secrets: the program, and what it runs."""
    words = " ".join(command).split()
    return " ".join(takewhile(lambda word: word == "-m" or not word.startswith("-"), words))[:LONGEST]
