"""Redacts command lines of other processes for logs and reports."""

import re
from collections.abc import Sequence
from itertools import takewhile

MAX_LENGTH = 80
INTERPRETER = re.compile(r"(.*/)?(python|pypy|perl|ruby|node|java|bash|sh)[\d.]*")
SCRIPT = re.compile(r"(/|\./)?[\w./-]*\.\w+|/[\w./-]+")
MAY_BE_SECRET = re.compile(r"-|.*(=|://)")  # an option, KEY=VALUE or a URL


def redacted_command(command: Sequence[str]) -> str:
    """Returns a command line without its arguments, which may contain secrets.

    Keeps the program and, for an interpreter, the script or module. Keeps the words of a process title, such as
    "nginx: master process nginx".
    """
    program, *rest = [word for word in command if word] or [""]
    words = [program, *rest]
    if rest:
        if not INTERPRETER.fullmatch(program):
            num_words = 1
        else:
            num_words = 3 if rest[0] == "-m" else 1 + bool(SCRIPT.fullmatch(rest[0]))
        words = words[:num_words]
    elif len(program.split()) > 1:
        words = program.split()
    return " ".join(takewhile(lambda word: word == "-m" or not MAY_BE_SECRET.match(word), words))[:MAX_LENGTH]
