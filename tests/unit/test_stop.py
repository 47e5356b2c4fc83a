"""The stop checker against one search over the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.text.stop import StopChecker

# Two letters: overlapping, nested and half-matching stop strings are then the rule and not the exception.
TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def whole(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The specification: the earliest start wins, then the longest."""
    matches = sorted((text.index(stop), -len(stop), stop) for stop in stops if stop in text)
    if not matches:
        return text, None
    start, _, stop = matches[0]
    return text[:start] + (stop if include else ""), stop


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS, include=st.booleans())
def test_the_answer_is_that_of_the_whole_text(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    sent = ""
    expected = whole("".join(pieces), stops, include)
    for piece in pieces:
        text, matched = checker.push(piece)
        sent += text
        assert matched == checker.matched
        assert expected[0].startswith(sent)
    sent += checker.flush()
    assert (sent, checker.matched) == expected


@settings(max_examples=200, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_no_more_is_held_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    sent = "".join(checker.push(character)[0] for character in text)
    if checker.matched is None:
        held = text[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_pieces() -> None:
    checker = StopChecker(["</tool>"])
    assert checker.push("call </to") == ("call ", None)
    assert checker.push("ol> more") == ("", "</tool>")
    assert checker.push("and more") == ("", "</tool>")
    assert checker.flush() == ""


def test_held_text_that_comes_to_nothing_is_sent() -> None:
    checker = StopChecker(["\n\n"])
    assert checker.push("a\n") == ("a", None)
    assert checker.push("b\n") == ("\nb", None)
    assert checker.flush() == "\n"
    assert checker.matched is None


def test_the_stop_string_is_kept_on_request() -> None:
    assert StopChecker(["END"], include_stop=True).push("the END of it") == ("the END", "END")


def test_the_longest_of_those_that_start_together_wins_even_if_it_comes_later() -> None:
    checker = StopChecker(["\n", "\n\n"], include_stop=True)
    assert checker.push("a\n") == ("a", None)
    assert checker.push("\n") == ("\n\n", "\n\n")


def test_flush_makes_the_match_that_was_waiting_for_a_longer_one() -> None:
    checker = StopChecker(["\n", "\n\n"])
    assert checker.push("a\n") == ("a", None)
    assert checker.flush() == ""
    assert checker.matched == "\n"


def test_without_stop_strings_everything_passes_at_once() -> None:
    checker = StopChecker([])
    assert checker.push("text") == ("text", None)
    assert checker.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])
