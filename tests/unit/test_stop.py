"""Compares the stop checker with one search in the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.text.stop import StopChecker

# Two letters only, so that most stop strings overlap, nest or match partially.
TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def truncate_whole_text(text: str, stops: list[str], include: bool, exempt: int = 0) -> tuple[str, str | None]:
    """Returns (text up to the stop string that must end it, that stop string or None): the expected result of the stop
    checker.

    The match that starts first wins; of those that start there, the longest. None ends within `exempt` characters.
    """
    matches = sorted(
        (start, -len(stop), stop)
        for start in range(len(text))
        for stop in stops
        if text.startswith(stop, start) and start + len(stop) > exempt
    )
    if not matches:
        return text, None
    start, _, stop = matches[0]
    return text[:start] + (stop if include else ""), stop


@settings(max_examples=500, deadline=None)
@given(chunks=st.lists(TEXT, max_size=6), stops=STOPS, include=st.booleans())
def test_result_does_not_depend_on_the_chunks(chunks: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    sent = ""
    expected = truncate_whole_text("".join(chunks), stops, include)
    for chunk in chunks:
        text, matched = checker.push(chunk)
        sent += text
        assert matched == checker.matched
        assert expected[0].startswith(sent)
    sent += checker.flush()
    assert (sent, checker.matched) == expected


@settings(max_examples=500, deadline=None)
@given(exempt=st.lists(TEXT, max_size=3), chunks=st.lists(TEXT, max_size=4), stops=STOPS, include=st.booleans())
def test_no_match_ends_within_exempt_text(
    exempt: list[str], chunks: list[str], stops: list[str], include: bool
) -> None:
    checker = StopChecker(stops, include)
    length = len("".join(exempt))
    expected = truncate_whole_text("".join([*exempt, *chunks]), stops, include, length)
    sent = "".join(checker.push_exempt(chunk) for chunk in exempt)
    assert checker.matched is None
    sent += "".join(checker.push(chunk)[0] for chunk in chunks) + checker.flush()
    assert (sent, checker.matched) == expected


@settings(max_examples=200, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_only_partial_stop_strings_are_buffered(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    sent = "".join(checker.push(character)[0] for character in text)
    if checker.matched is None:
        buffered = text[len(sent) :]
        assert not buffered or any(stop.startswith(buffered) for stop in stops)


def test_a_stop_string_across_chunks() -> None:
    checker = StopChecker(["</tool>"])
    assert checker.push("call </to") == ("call ", None)
    assert checker.push("ol> more") == ("", "</tool>")
    assert checker.push("and more") == ("", "</tool>")
    assert checker.flush() == ""


def test_buffered_text_without_a_match_is_sent() -> None:
    checker = StopChecker(["\n\n"])
    assert checker.push("a\n") == ("a", None)
    assert checker.push("b\n") == ("\nb", None)
    assert checker.flush() == "\n"
    assert checker.matched is None


def test_include_stop_keeps_the_stop_string() -> None:
    assert StopChecker(["END"], include_stop=True).push("the END of it") == ("the END", "END")


def test_the_longest_match_with_the_same_start_wins() -> None:
    checker = StopChecker(["\n", "\n\n"], include_stop=True)
    assert checker.push("a\n") == ("a", None)
    assert checker.push("\n") == ("\n\n", "\n\n")


def test_flush_ends_the_wait_for_a_longer_match() -> None:
    checker = StopChecker(["\n", "\n\n"])
    assert checker.push("a\n") == ("a", None)
    assert checker.flush() == ""
    assert checker.matched == "\n"


def test_without_stop_strings_text_is_not_buffered() -> None:
    checker = StopChecker([])
    assert checker.push("text") == ("text", None)
    assert checker.flush() == ""


def test_an_empty_stop_string_is_rejected() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])
