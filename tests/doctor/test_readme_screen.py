"""The README's screen equals the doctor's output for a small /dev/shm, a taken port and a misspelled WORLD_RANK."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import random_model
from tests.doctor.fixtures import REPOSITORY, doctor, failed_checks, report

README = (REPOSITORY / "README.md").read_text()
# Namespaces with 2 MiB of shared memory, and with port 10000 taken by a child of this shell.
FAULTS = """\
mount -t tmpfs -o size=2m shm /dev/shm && ip link set lo up || exit 99
"$0" -c 'import socket, time; s = socket.create_server(("0.0.0.0", 10000)); print(flush=True); time.sleep(60)' >"$1" &
until [ -s "$1" ]; do sleep 0.1; done
shift; "$@"; code=$?; kill $!; exit $code
"""


def normalize(text: str) -> str:
    """Returns the text as one line, without the process that holds the port."""
    text = re.sub(r"pid \d+ \([^)]*\)", "pid N", " ".join(text.split()))
    return re.sub(r"kill \d+", "kill N", text)


def test_screen_equals_the_output(tmp_path: Path) -> None:
    screen = normalize(README.split("<!-- doctor -->")[1].split("<!-- /doctor -->")[0])
    random_model.write(tmp_path / "model")
    env = {"RTP_RUNTIME": "docker", "TP_SIZE": "2", "WROLD_RANK": "0", "CHECKPOINT_PATH": str(tmp_path / "model")}
    inside = ["unshare", "--mount", "--net", "sh", "-c", FAULTS, sys.executable, str(tmp_path / "listens")]
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    process = doctor("-o", "json", env=env, inside=inside)
    result = report(process)
    assert (list(failed_checks(result)), process.returncode) == (re.findall(r"× ([A-Z]-\d+)", screen), 1)  # noqa: RUF001
    assert set(failed_checks(result)) == {"M-13", "S-01", "N-08"}
    for check in (c for c in result["checks"] if c["id"] in failed_checks(result)):
        assert normalize(f"{check['id']} {check['actual']}; expected {check['expected']}") in screen
        assert (
            normalize(f'seen as "{check["symptom"][0]}" fix {check["fix"]["docker"] or check["fix"]["host"]}') in screen
        )
