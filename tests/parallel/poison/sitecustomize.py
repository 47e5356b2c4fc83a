"""A fault, injected by PYTHONPATH: a rank is killed by a step that has the tokens of a poison request.

POISON_METHOD of Step decides which rank dies: to_bytes runs on rank 0, from_bytes on the other ranks.
"""

import os
import signal
from typing import Any

from rtp_llm.contract.step import Step

POISON = [0, 0, 0]  # token ids


def die_of_poison(step: Step) -> None:
    if str(POISON).strip("[]") in str(step.token_ids.tolist()):
        os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("POISON_METHOD") == "to_bytes":
    to_bytes = Step.to_bytes

    def to_bytes_or_die(step: Step) -> bytes:
        die_of_poison(step)
        return to_bytes(step)

    Step.to_bytes = to_bytes_or_die  # type: ignore[method-assign, assignment]

elif os.environ.get("POISON_METHOD") == "from_bytes":
    from_bytes = Step.from_bytes

    def from_bytes_or_die(cls: type[Step], data: bytes) -> Any:
        step = from_bytes(data)
        die_of_poison(step)
        return step

    Step.from_bytes = classmethod(from_bytes_or_die)  # type: ignore[assignment]
