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
        """Returns the seconds to the first token."""
        return self.events[0] - self.start

    @property
    def e2e(self) -> float:
        """Returns the seconds to the last token."""
        return self.events[-1] - self.start

    @property
    def gaps(self) -> list[float]:
        """Returns the seconds between each output event and the next one."""
        return [later - earlier for earlier, later in pairwise(self.events)]

    def summary(self) -> dict[str, Any]:
        """Returns the fields of this request for the JSON file of a run: all except the times of the events."""
        summary = {key: value for key, value in asdict(self).items() if key != "events"}
        times = {"ttft": self.ttft, "e2e": self.e2e, "itl_max": max(self.gaps, default=0.0)} if self.events else {}
        return summary | {"num_events": len(self.events)} | {name: round(value, 6) for name, value in times.items()}
