"""Every way this product can fail, by name: exit codes of processes, errors of requests.

Failure is a value here: a process ends with one of `ExitCode`, a request with one terminal event.
"""

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What a process of ours ends with; start_server hands it to the container's runtime."""

    OK = 0
    BAD_CONFIG = 64
    BAD_CHECKPOINT = 65
    GANG_INCOMPLETE = 69
    RANK_CRASHED = 70
    COMMUNICATION = 71
    HANG = 72
    GPU_FAULT = 73
    DOCTOR = 75

    @property
    def is_final(self) -> bool:
        """True where a restart in place cannot help: the same input would fail in the same way.

        69 belongs here because the roll call has already waited GANG_TIMEOUT_MIN, or found parts that disagree.
        """
        return self in _FINAL


_FINAL = {
    ExitCode.BAD_CONFIG,
    ExitCode.BAD_CHECKPOINT,
    ExitCode.GANG_INCOMPLETE,
    ExitCode.GPU_FAULT,
    ExitCode.DOCTOR,
}


class FatalError(Exception):
    """An error that ends the process with a documented exit code and one readable message, no traceback.

    `check`: the doctor's id of what is wrong, where it knows it; the doctor reports the same error under it.
    """

    exit_code = ExitCode.RANK_CRASHED

    def __init__(self, message: str, *, check: str = ""):
        super().__init__(message)
        self.check = check


class ConfigError(FatalError):
    """Input the operator must mend: names the file or variable, the key, the value and what is allowed.

    `names`: the variables at fault, where it is about single ones.
    """

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, message: str, *, check: str = "", names: tuple[str, ...] = ()):
        super().__init__(message, check=check)
        self.names = names


class CheckpointError(FatalError):
    """A checkpoint or tokenizer that cannot be served as it lies on disk."""

    exit_code = ExitCode.BAD_CHECKPOINT


class GangError(FatalError):
    """The parts disagree, or one never came."""

    exit_code = ExitCode.GANG_INCOMPLETE


class DoctorError(FatalError):
    """The doctor found what a start would fail or hang on."""

    exit_code = ExitCode.DOCTOR


class CommunicationError(FatalError):
    """A peer that had joined is gone, or spoke out of turn."""

    exit_code = ExitCode.COMMUNICATION


class GpuError(FatalError):
    """The device failed; another start on it is not worth a try."""

    exit_code = ExitCode.GPU_FAULT


class RequestError(Exception):
    """A request that ends in an error answer.

    `status` is the HTTP status, `code`/`name` upstream's `error_code` (reference: alibaba/rtp-llm,
    config/exceptions.py), `param` the field at fault where there is one.
    """

    def __init__(self, status: int, code: int, name: str, message: str, *, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.name, self.message, self.param = status, code, name, message, param

    def body(self) -> dict[str, Any]:
        """Upstream's three fields, and OpenAI's object, which its clients show to their users."""
        kinds = {429: "rate_limit_error"} | dict.fromkeys(range(400, 429), "invalid_request_error")
        kind = kinds.get(self.status, "server_error")
        return {
            "error_code": self.code,
            "error_code_str": f"{self.code}_{self.name}",
            "message": self.message,
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.name.lower()},
        }


def invalid_format(message: str, param: str | None = None) -> RequestError:
    """400: the body is not what the endpoint takes."""
    return RequestError(400, 507, "ERROR_INPUT_FORMAT_ERROR", message, param=param)


def invalid_params(message: str, param: str | None = None) -> RequestError:
    """400: a field has a value that cannot be used."""
    return RequestError(400, 605, "INVALID_PARAMS", message, param=param)


def unsupported(message: str, param: str | None = None) -> RequestError:
    """400: a known field whose feature this server does not have."""
    return RequestError(400, 515, "UNSUPPORTED_OPERATION", message, param=param)


def empty_prompt(message: str = "the prompt is empty: send at least one token") -> RequestError:
    return RequestError(400, 510, "EMPTY_PROMPT_ERROR", message, param="prompt")


def long_prompt(message: str) -> RequestError:
    return RequestError(400, 511, "LONG_PROMPT_ERROR", message, param="prompt")


def overloaded(message: str) -> RequestError:
    """429: the bounded queue is full."""
    return RequestError(429, 409, "CONCURRENCY_LIMIT_ERROR", message)


def timed_out(message: str) -> RequestError:
    return RequestError(504, 603, "GENERATE_TIMEOUT", message)


def execution_failed(message: str) -> RequestError:
    """500: the model failed on this request; sending it again would not help."""
    return RequestError(500, 606, "EXECUTION_EXCEPTION", message)


def engine_gone(message: str) -> RequestError:
    """503: the ranks did not come back in time, or never came up."""
    return RequestError(503, 606, "EXECUTION_EXCEPTION", message)
