"""A flag with which one thread interrupts the collectives that another thread waits in."""

from rtp_llm.errors import CommunicationError


class AbortFlag:
    """A flag that any thread sets, once, to end a communicator. All loops that wait for other ranks check it."""

    def __init__(self) -> None:
        self.reason = ""

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason or "no reason given"

    def check(self) -> None:
        """Raises CommunicationError if the flag is set."""
        if self.reason:
            raise CommunicationError(f"aborted: {self.reason}")
