"""Lifecycle of a process: ends it with its parent and with a documented exit code."""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rtp_llm.errors import ExitCode, FatalError

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # prctl(2)

MIN_OPEN_FILES = 1024  # supervisord does not start with a lower limit (its minfds)


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent process exits, so that no orphan holds a port or a GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_with_supervisord(run_dir: Path) -> None:
    """Makes the kernel kill this process when its parent, supervisord, exits.

    Exits at once if supervisord has already exited or the part is stopping: nothing else would tell this process, since
    a SIGTERM that arrives between fork and exec is lost. Call this function first in a process.
    """
    die_with_parent()
    pid_file = run_dir / "supervisord.pid"
    orphaned = not run_dir.exists() or (pid_file.exists() and int(pid_file.read_text()) != os.getppid())
    if orphaned or stopping_file(run_dir).exists():
        os._exit(ExitCode.OK)


def stopping_file(run_dir: Path) -> Path:
    """Returns the path of the file that start_server (main process of a part) creates when it gets a stop signal."""
    return run_dir / "stopping"


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs `main`, then exits the process: with the code of a FatalError that `main` raises, with RANK_CRASHED after
    another exception (in any thread), otherwise, and after KeyboardInterrupt, with 0.

    Uses os._exit, so that a hung thread or collective cannot block the exit.
    """
    faulthandler.enable()
    threading.excepthook = _on_thread_failed
    code: int = ExitCode.OK
    try:
        main()
    except FatalError as error:
        log.critical("%s", error)
        code = error.exit_code
    except KeyboardInterrupt:
        pass
    except BaseException:
        log.critical("unexpected error; the process exits", exc_info=True)
        code = ExitCode.RANK_CRASHED
    _exit(code)


def exit_process(message: str, code: ExitCode) -> NoReturn:
    """Logs the message and exits with `code`.

    Uses os._exit because a hung collective blocks a normal exit; the guard restarts the process.
    """
    log.critical("%s: this process exits (exit code %d)", message, code)
    _exit(code)


def _on_thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Exits the process after an exception in a thread: the process must not continue without one of its threads."""
    name = failure.thread.name if failure.thread else "?"
    log.critical("thread %s failed; the process exits", name, exc_info=failure.exc_value)
    _exit(ExitCode.RANK_CRASHED)


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
