"""Tool calls that are JSON objects with the name and arguments of a function. Several formats use them."""

import json
import re
from abc import ABC
from typing import ClassVar

from rtp_llm.text.scanner import Malformed, Reading, Sink
from rtp_llm.text.tool_formats.tool_format import ToolCallParser

_ARGUMENTS = ("arguments", "parameters")
_OTHER_KEYS = ("name", "type", "id")
_IN_STRING = re.compile(r'[^"\\\n]*')
_SCALAR = re.compile(r'[^\s"{}\[\],:<]*')
_BRACES = re.compile(r"[\s}]*")
_BETWEEN = re.compile(r"[\s,:]*")


class JsonCallParser(ToolCallParser, ABC):
    """Reads `{"name": …, "arguments": {…}}`.

    end         text that ends a call even if its JSON is incomplete
    is_strict   treat an object without arguments or with other keys as content, since no marker identifies calls
    """

    end: ClassVar[str] = ""
    is_strict: ClassVar[bool] = False

    def read_object(self, is_open: bool = False) -> Reading[None]:
        """Reads one call; with `is_open`, its opening brace has been read already.

        Raises Malformed if the text is not a call. The caller then passes on the text as content: all of it, or only
        what follows the arguments if the call's name and arguments have been sent to the client already.
        """
        scanner, name, arguments, is_announced = self.scanner, "", "", False
        if not is_open:
            yield from scanner.expect("{")
        while True:
            key = yield from self._string()
            yield from scanner.expect(":")
            yield from scanner.skip_space()
            if self.is_strict and key not in _ARGUMENTS + _OTHER_KEYS:
                raise Malformed
            is_object = (yield from scanner.peek()) == "{"
            if key == "name" and not name:
                name = yield from self._string()
            elif key in _ARGUMENTS and is_object and name and not is_announced:
                self.begin_call(name)
                is_announced = True
                yield from self.read_value(self.add_arguments)
                scanner.mark()  # what follows is content if it is not the rest of a call
            else:
                pieces: list[str] = []
                yield from self.read_value(pieces.append)
                arguments = "".join(pieces) if key in _ARGUMENTS else arguments
            yield from scanner.skip_space()
            if not (yield from scanner.skip(",")):
                break
        if not is_announced:
            yield from scanner.expect("}")
            self._begin_late(name, arguments)
        yield from scanner.run(_BRACES, lambda _: None)  # models add or forget a brace at times

    def _begin_late(self, name: str, arguments: str) -> None:
        """Announces a call whose arguments came before its name, are not an object, or are missing."""
        try:
            value = json.loads(arguments or "null")
            if isinstance(value, str):  # JSON text in a string
                arguments, value = value, json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed from None
        if value is None and not self.is_strict:
            arguments, value = "{}", {}
        if not name or not isinstance(value, dict):
            raise Malformed
        self.begin_call(name)
        self.add_arguments(arguments)

    def _string(self) -> Reading[str]:
        """Reads a short JSON string."""
        yield from self.scanner.skip_space()
        pieces: list[str] = []
        yield from self._read_string(pieces.append)
        try:
            value = json.loads("".join(pieces))
        except ValueError:
            raise Malformed from None
        if not isinstance(value, str):
            raise Malformed
        return value

    def read_value(self, sink: Sink) -> Reading[None]:
        """Reads a JSON value and passes it to `sink` as it arrives. Stops early at the call's end marker (`self.end`).

        Checks only brackets and strings, so that the client gets what the model wrote.
        """
        scanner, depth = self.scanner, 0
        while char := (yield from scanner.peek()):
            if char == '"':
                yield from self._read_string(sink)
            elif char in "{[":
                depth += 1
                sink((yield from scanner.char()))
            elif char in "}]":
                depth -= 1
                sink((yield from scanner.char()))
            elif self.end and (yield from scanner.is_next(self.end)):
                return
            elif char == "<":
                sink((yield from scanner.char()))
            else:
                yield from scanner.run(_SCALAR, sink)
            if depth <= 0:
                return
            yield from scanner.run(_BETWEEN, sink)

    def _read_string(self, sink: Sink) -> Reading[None]:
        """Reads a string with its quotes. `self.end` is text in it, unless it follows a newline, which JSON does not
        allow in strings: there the model forgot the quote.
        """
        scanner = self.scanner
        if (yield from scanner.peek()) != '"':
            raise Malformed
        sink((yield from scanner.char()))
        while True:
            yield from scanner.run(_IN_STRING, sink)
            char = yield from scanner.char()
            sink(char)
            if char in ('"', ""):
                return
            if char == "\\":
                sink((yield from scanner.char()))
            elif self.end and (yield from scanner.is_next(self.end)):
                return
