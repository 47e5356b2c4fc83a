"""The record of one request: when it was sent, when its tokens arrived, how it ended.

Imports only the standard library: the workers of other engines import it in the Python that has their engine.
"""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Record:
    """One request of a run. All times are seconds since the run began.

    start          when the request was sent (closed loop), or was due (open loop)
    events         when each piece of output arrived; usually one token each
    output_tokens  as the server counted them
    error          why the request failed; empty if it did not
    """

    input_tokens: int
    start: float
    events: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Returns the seconds from `start` to the first token. The request must have output."""
        return self.events[0] - self.start

    @property
    def e2e(self) -> float:
        """Returns the seconds from `start` to the last token. The request must have output."""
        return self.events[-1] - self.start

    @property
    def gaps(self) -> list[float]:
        """Returns the seconds between each output event and the next one."""
        return [later - earlier for earlier, later in pairwise(self.events)]

    def summary(self) -> dict[str, Any]:
        """Returns this record for the JSON report. In place of `events`, it has their number (`num_events`) and, if
        there are any, `ttft`, `e2e` and the longest gap (`itl_max`) in seconds.
        """
        summary = {key: value for key, value in asdict(self).items() if key != "events"}
        times = {"ttft": self.ttft, "e2e": self.e2e, "itl_max": max(self.gaps, default=0.0)} if self.events else {}
        return summary | {"num_events": len(self.events)} | {name: round(value, 6) for name, value in times.items()}
