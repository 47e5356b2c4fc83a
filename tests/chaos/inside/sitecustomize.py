"""Runs at the start of every Python process of a part under test, because PYTHONPATH names this folder.

In an engine process, SIGUSR2 is an exit with code 0, a prompt with POISON kills rank 0 in the step that reads it, and
loading weights takes CHAOS_LOADING_SECONDS more.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

POISON, REPEATS = 900, 4  # a token that stands so often in a row


def _exit_when_told() -> None:
    signal.sigwait({signal.SIGUSR2})
    os._exit(0)


def _die_of_poison(runner_module: Any) -> None:
    forward = runner_module.ModelRunner.forward

    def poisoned_forward(runner: Any, inputs: Any) -> Any:
        text = ",".join(map(str, inputs.token_ids.tolist()))
        if ",".join([str(POISON)] * REPEATS) in text and runner.residency.mesh.tp.rank == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        return forward(runner, inputs)

    runner_module.ModelRunner.forward = poisoned_forward


def _load_slowly(weights_module: Any) -> None:
    load = weights_module.load_weights

    def slow_load(*arguments: Any, **options: Any) -> Any:
        time.sleep(float(os.environ.get("CHAOS_LOADING_SECONDS", "0")))
        return load(*arguments, **options)

    weights_module.load_weights = slow_load


CHANGES: dict[str, Callable[[Any], None]] = {
    "rtp_llm.runner.model_runner": _die_of_poison,
    "rtp_llm.model.weights": _load_slowly,
}


class _ChangingLoader(importlib.abc.Loader):
    """Loads a module as another loader does, then changes it."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        CHANGES[module.__name__](module)


class _ChangingFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        spec.loader = _ChangingLoader(spec.loader)
        return spec


if "FAKETIME_TIMESTAMP_FILE" in os.environ:
    # libfaketime 0.9.10 makes clock_nanosleep fail, which Python's sleep is.
    time.sleep = lambda seconds: select.select([], [], [], float(seconds))  # type: ignore[assignment, misc]

if "rtp_llm.engine.main" in sys.orig_argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # inherited by all threads
    threading.Thread(target=_exit_when_told, name="chaos", daemon=True).start()
    sys.meta_path.insert(0, _ChangingFinder())
