"""Ties a process's life to its parent's and its end to a documented exit code."""

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


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however it ends: no orphan keeps a port or a GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_with_supervisord(run_dir: Path) -> None:
    """A process of the part dies with supervisord, and does not begin where the part is ending already.

    Both can happen while Python starts: the kernel is then asked too late, and a SIGTERM between fork and exec is lost.
    """
    die_with_parent()
    pid_file = run_dir / "supervisord.pid"
    orphaned = not run_dir.exists() or (pid_file.exists() and int(pid_file.read_text()) != os.getppid())
    if orphaned or stopping_file(run_dir).exists():
        os._exit(ExitCode.OK)


def stopping_file(run_dir: Path) -> Path:
    """There from the moment on that start_server was asked to stop."""
    return run_dir / "stopping"


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs a process's main and ends it with its code. Leaves by _exit: a thread or a collective that hangs cannot
    hold it.
    """
    faulthandler.enable()
    threading.excepthook = _thread_failed
    code: int = ExitCode.OK
    try:
        main()
    except FatalError as error:
        log.critical("%s", error)
        code = error.exit_code
    except KeyboardInterrupt:
        pass
    except BaseException:
        log.critical("unexpected error", exc_info=True)
        code = ExitCode.RANK_CRASHED
    _exit(code)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A process must not go on without one of its threads."""
    log.critical("thread %s failed", failure.thread.name if failure.thread else "?", exc_info=failure.exc_value)
    _exit(ExitCode.RANK_CRASHED)


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
