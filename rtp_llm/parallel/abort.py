"""The flag with which one thread ends the collectives that another one waits in."""

from rtp_llm.errors import CommunicationError


class AbortFlag:
    """Set once by any thread. Everything that waits for peers reads it."""

    def __init__(self) -> None:
        self.reason = ""

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason or "no reason given"

    def check(self) -> None:
        """Raises CommunicationError if the flag is set."""
        if self.reason:
            raise CommunicationError(f"aborted: {self.reason}")
