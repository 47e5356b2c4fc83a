"""A machine without space, without memory, or with a wrong clock."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.faults.registry import NotHereError, Scene, fault, send_signal
from tests.chaos.sandbox import can_isolate

SHORT = (1.0, 6.0)  # seconds
FAKETIME = "libfaketimeMT.so.1"
FOLDERS = ("/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime", "/usr/lib64/faketime")
MIB = 1 << 20


@fault("/dev/shm is full while a rank is lost, 1 to 6 s", seconds=SHORT)
def fill_shm(scene: Scene) -> Iterator[None]:
    sandbox = scene.rig.places[0].sandbox
    sandbox.fill_shm()
    send_signal(scene.random_rank(), signal.SIGKILL)
    yield
    sandbox.empty_shm()


@fault("the disk of the run directory is full, 1 to 6 s", seconds=SHORT)
def fill_disk(scene: Scene) -> Iterator[None]:
    sandbox = scene.rig.places[0].sandbox
    sandbox.fill_disk()
    yield
    sandbox.empty_disk()


@fault("the disk of the run directory is full while a rank is lost, 1 to 6 s", seconds=SHORT)
def fill_disk_and_kill_rank(scene: Scene) -> Iterator[None]:
    sandbox = scene.rig.places[0].sandbox
    sandbox.fill_disk()
    send_signal(scene.random_rank(), signal.SIGKILL)
    yield
    sandbox.empty_disk()


@fault("the memory limit of the container falls to 8 MiB above its use, 2 to 10 s", seconds=(2.0, 10.0))
def limit_memory(scene: Scene) -> Iterator[None]:
    sandbox = scene.rig.places[0].sandbox
    for is_last in (*[False] * 9, True):
        used = sandbox.used_memory()
        try:
            sandbox.limit_memory(used + 8 * MIB)
            break
        except OSError:  # v1: more is used by now, and the kernel cannot reclaim it
            if is_last:
                raise
    scene.target = f"{used / MIB:.0f} MiB used"
    yield
    sandbox.limit_memory(-1)


def _fake_clock() -> dict[str, str]:
    """Returns the environment variables with which a file says how far the wall clock is off."""
    folders = [os.environ.get("FAKETIME_FOLDER", ""), *FOLDERS]
    library = next((Path(folder) / FAKETIME for folder in folders if (Path(folder) / FAKETIME).exists()), None)
    if not library:
        raise NotHereError(f"no {FAKETIME}: install libfaketime, or set FAKETIME_FOLDER")
    if not can_isolate():
        raise NotHereError("no namespaces and cgroups, without which libfaketime leaves files in /dev/shm")
    folder = tempfile.mkdtemp(prefix="rtp-chaos-clock-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder) / "offset"
    file.write_text("+0\n")
    return {
        "CHAOS_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _jump(scene: Scene, seconds: int) -> Iterator[None]:
    file = Path(scene.rig.places[0].env["FAKETIME_TIMESTAMP_FILE"])
    file.write_text(f"{seconds:+d}\n")
    yield
    file.write_text("+0\n")


@fault("the wall clock jumps an hour ahead, and back after 2 to 8 s", settings=_fake_clock, seconds=(2.0, 8.0))
def clock_ahead(scene: Scene) -> Iterator[None]:
    yield from _jump(scene, 3600)


@fault("the wall clock jumps an hour back, and ahead after 2 to 8 s", settings=_fake_clock, seconds=(2.0, 8.0))
def clock_back(scene: Scene) -> Iterator[None]:
    yield from _jump(scene, -3600)
