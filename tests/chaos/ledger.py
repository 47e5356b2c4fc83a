"""Judges the entries of the ledger: every accepted request must end exactly once, with its undisturbed text."""

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import pairwise

from tests.chaos.client import Request, Response
from tests.chaos.load import Entry

RETRIED = (408, 409, 429)  # and every 5xx: the OpenAI SDK sends the request again
Texts = Mapping[str, Mapping[int, str]]  # by name of the request, then by choice


class Outcome(StrEnum):
    """How a request ended, as its client sees it."""

    COMPLETE = "complete"
    REFUSED = "refused"  # after the fault: a well-formed 429 or 503, or no connection
    ERROR = "error"  # one well-formed error
    CUT = "cut"  # the connection ended early
    WRONG = "wrong"  # another text, twice ended, malformed
    HUNG = "hung"  # still open at the end


def judge(entry: Entry, texts: Texts, injected_at: float) -> tuple[Outcome, str]:
    """Returns how a request ended, and a sentence if that is more than a plain end. `injected_at`: of the fault."""
    request, response = entry.request, entry.response
    if response.is_open:
        return Outcome.HUNG, f"open with {sum(map(len, response.text.values()))} characters"
    if response.errors:
        return _judge_error(request, response, injected_at)
    if response.broken.startswith("ConnectionRefused") and response.sent_at > injected_at:
        return Outcome.REFUSED, response.broken
    if response.broken:
        is_parse_error = not response.broken.startswith(
            ("Connection", "IncompleteRead", "Remote", "Timeout", "OSError")
        )
        return (Outcome.WRONG if is_parse_error else Outcome.CUT), response.broken
    return _judge_text(request, response, texts[request.name])


def _judge_error(request: Request, response: Response, injected_at: float) -> tuple[Outcome, str]:
    error = response.errors[0]
    is_well_formed = (
        isinstance(error.get("error_code"), int)
        and bool(error.get("message"))
        and isinstance(error.get("error"), dict)
        and bool(error["error"].get("message"))
    )
    ends_once = len(response.errors) == 1 and (
        not request.is_stream or response.status != 200 or response.num_done == 1
    )
    text = f"{response.status}: {error.get('message', error)}"
    if not is_well_formed or not ends_once or response.broken:
        return Outcome.WRONG, f"not one well-formed error: {text} {response.broken}"
    if response.status in (429, 503) and response.sent_at > injected_at:
        return Outcome.REFUSED, text
    return Outcome.ERROR, text


def _judge_text(request: Request, response: Response, text: Mapping[int, str]) -> tuple[Outcome, str]:
    ends = Counter(response.finishes)
    if set(ends) != set(text) or any(count != 1 for count in ends.values()):
        is_cut = request.is_stream and not response.num_done
        return (
            Outcome.CUT if is_cut else Outcome.WRONG
        ), f"choices ended {dict(ends)}, expected each of {list(text)} once"
    if request.is_stream and response.num_done != 1:
        return Outcome.WRONG, f"{response.num_done} [DONE] events"
    if response.text != text:
        index = next(i for i in text if response.text.get(i) != text[i])
        received, expected = response.text.get(index, ""), text[index]
        at = next((n for n, (a, b) in enumerate(zip(received, expected, strict=False)) if a != b), len(received))
        return Outcome.WRONG, f"another text from character {at} of {len(expected)} on: {received[at : at + 30]!r}"
    return Outcome.COMPLETE, ""


def judge_marked(entry: Entry) -> str:
    """Returns what is wrong with the end of a request that is itself the fault; empty if it got one final error."""
    outcome, text = judge(entry, {}, entry.response.ended_at)
    if outcome != Outcome.ERROR:
        return f"the culprit ended as {outcome}: {text}"
    is_final = entry.response.headers.get("x-should-retry") == "false" or entry.response.status == 200
    is_final |= 400 <= entry.response.status < 500 and entry.response.status not in RETRIED
    return "" if is_final else f"the culprit's error makes clients retry: {text}"


def longest_pause(entries: Iterable[Entry], since: float) -> float:
    """Returns the longest time in seconds without a piece of text on a stream of `entries`, from `since` on."""
    pauses = [0.0]
    for entry in entries:
        if entry.request.is_stream:
            times = [since, *(t for t in entry.response.arrivals if t > since), entry.response.ended_at]
            pauses += [later - earlier for earlier, later in pairwise(times)]
    return max(pauses)
