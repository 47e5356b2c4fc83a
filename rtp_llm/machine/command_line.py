"""Other people's processes, as they may be shown."""

import re
from collections.abc import Sequence
from itertools import takewhile

MAX_LENGTH = 80
INTERPRETER = re.compile(r"(.*/)?(python|pypy|perl|ruby|node|java|bash|sh)[\d.]*")
SCRIPT = re.compile(r"(/|\./)?[\w./-]*\.\w+|/[\w./-]+")
MAY_BE_SECRET = re.compile(r"-|.*(=|://)")  # an option, a value, an address: what may hold a secret


def redacted_command(command: Sequence[str]) -> str:
    """A command line without its arguments, which may be secrets: the program and, of an interpreter, the script or
    module. A process that has given itself a title ("nginx: master process nginx") is called by that."""
    program, *rest = [word for word in command if word] or [""]
    words = [program, *rest]
    if rest:
        kept = (
            1 if not INTERPRETER.fullmatch(program) else 3 if rest[0] == "-m" else 1 + bool(SCRIPT.fullmatch(rest[0]))
        )
        words = words[:kept]
    elif len(program.split()) > 1:
        words = program.split()
    return " ".join(takewhile(lambda word: word == "-m" or not MAY_BE_SECRET.match(word), words))[:MAX_LENGTH]
