"""All errors: exit codes of processes and errors of requests.

A process ends with an `ExitCode`, a failed request with one `RequestError`.
"""

from collections.abc import Iterable
from enum import IntEnum
from functools import partial
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of all processes. start_server passes them on to the container runtime."""

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
        """True if a restart of the ranks cannot help, because the same input fails again.

        GANG_INCOMPLETE is final because the rendezvous has already waited GANG_TIMEOUT_MIN, or parts have different
        settings: only a restart of the whole part helps, once the other part is up or corrected.
        """
        return self in _FINAL_CODES


_FINAL_CODES = {
    ExitCode.BAD_CONFIG,
    ExitCode.BAD_CHECKPOINT,
    ExitCode.GANG_INCOMPLETE,
    ExitCode.GPU_FAULT,
    ExitCode.DOCTOR,
}


class FatalError(Exception):
    """Ends the process with a documented exit code and one message, without a traceback.

    `check`: id of the doctor's check that reports the same error; empty if there is none.
    """

    exit_code = ExitCode.RANK_CRASHED

    def __init__(self, message: str, *, check: str = ""):
        super().__init__(message)
        self.check = check


class ConfigError(FatalError):
    """Invalid input. The message has the file or variable, the key, the value and the allowed values.

    `names`: the environment variables with an invalid value; empty if the error is not about certain variables.
    `fix`: the correct setting as text; empty if it is not known.
    """

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, message: str, *, check: str = "", names: tuple[str, ...] = (), fix: str = ""):
        super().__init__(message, check=check)
        self.names, self.fix = names, fix


class CheckpointError(FatalError):
    """The checkpoint or the tokenizer is damaged or not supported."""

    exit_code = ExitCode.BAD_CHECKPOINT


class GangError(FatalError):
    """The rendezvous failed: the parts have different settings, or a part did not join in time."""

    exit_code = ExitCode.GANG_INCOMPLETE


class DoctorError(FatalError):
    """The doctor found an error that would make the server fail or hang, and that the server itself does not check."""

    exit_code = ExitCode.DOCTOR


class CommunicationError(FatalError):
    """After the rendezvous, another process disconnected, did not respond in time or sent an unexpected message."""

    exit_code = ExitCode.COMMUNICATION


class GpuError(FatalError):
    """The GPU failed. A restart on the same GPU would fail again."""

    exit_code = ExitCode.GPU_FAULT


class RequestError(Exception):
    """Ends a request with an error response.

    `status` is the HTTP status, `code` and `name` are an error code of alibaba/rtp-llm (config/exceptions.py), `param`
    is the invalid field if there is one. `is_final`: a server error that a retry of the same request would get again.
    `openai_code`: the body's `error.code`, if OpenAI's clients know one for this error; otherwise `name` in lowercase.
    """

    def __init__(
        self,
        status: int,
        code: int,
        name: str,
        message: str,
        *,
        param: str | None = None,
        is_final: bool = False,
        openai_code: str = "",
    ):
        super().__init__(message)
        self.status, self.code, self.name, self.message, self.param = status, code, name, message, param
        self.is_final, self.openai_code = is_final, openai_code or name.lower()

    def headers(self) -> dict[str, str]:
        """Returns the response headers that tell a client whether to retry or to authenticate.

        They are `x-should-retry: false` for a final error (OpenAI's SDKs retry every other 5xx), `WWW-Authenticate` for
        401, and `Retry-After` in seconds for 429 and 503.
        """
        if self.is_final:
            return {"x-should-retry": "false"}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the error cross from the process that prepares large bodies; exceptions forget keyword arguments."""
        rebuild = partial(RequestError, param=self.param, is_final=self.is_final, openai_code=self.openai_code)
        return rebuild, (self.status, self.code, self.name, self.message)

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the response.

        It has the three fields of alibaba/rtp-llm's errors, and the `error` object that OpenAI's clients display.
        """
        types = {429: "rate_limit_error"} | dict.fromkeys(range(400, 429), "invalid_request_error")
        error_type = types.get(self.status, "server_error")
        return {
            "error_code": self.code,
            "error_code_str": f"{self.code}_{self.name}",
            "message": self.message,
            "error": {"message": self.message, "type": error_type, "param": self.param, "code": self.openai_code},
        }


def invalid_format(message: str, param: str | None = None) -> RequestError:
    """400: the body does not match the endpoint's schema."""
    return RequestError(400, 507, "ERROR_INPUT_FORMAT_ERROR", message, param=param)


def invalid_params(message: str, param: str | None = None) -> RequestError:
    """400: a field has an invalid value."""
    return RequestError(400, 605, "INVALID_PARAMS", message, param=param)


def unsupported(message: str, param: str | None = None) -> RequestError:
    """400: the field is known, but this server does not implement its feature."""
    return RequestError(400, 515, "UNSUPPORTED_OPERATION", message, param=param)


def empty_prompt(message: str = "the prompt is empty: send at least one token", param: str = "prompt") -> RequestError:
    return RequestError(400, 510, "EMPTY_PROMPT_ERROR", message, param=param)


def long_prompt(message: str, param: str = "prompt") -> RequestError:
    """400: the prompt leaves no room for output. litellm and LangChain expect the code `context_length_exceeded`."""
    code = "context_length_exceeded"
    return RequestError(400, 511, "LONG_PROMPT_ERROR", message, param=param, openai_code=code)


def model_not_found(name: str, served: Iterable[str]) -> RequestError:
    message = f"The model `{name[:200]}` does not exist; this server has {', '.join(served)}"
    return RequestError(404, 507, "ERROR_INPUT_FORMAT_ERROR", message, param="model", openai_code="model_not_found")


def overloaded(message: str) -> RequestError:
    """429: all slots are in use or the queue is full."""
    return RequestError(429, 409, "CONCURRENCY_LIMIT_ERROR", message)


def timed_out(message: str) -> RequestError:
    return RequestError(504, 603, "GENERATE_TIMEOUT", message)


def execution_failed(message: str) -> RequestError:
    """500: the model failed on this request; a retry would fail again."""
    return RequestError(500, 606, "EXECUTION_EXCEPTION", message, is_final=True)


def out_of_memory(message: str) -> RequestError:
    """503: the host has too little memory for the request's KV cache now; a later retry may succeed."""
    return RequestError(503, 602, "MALLOC_ERROR", message)


def engine_gone(message: str) -> RequestError:
    """503: the ranks have not started or restarted in time, or the server is stopping."""
    return RequestError(503, 606, "EXECUTION_EXCEPTION", message)
