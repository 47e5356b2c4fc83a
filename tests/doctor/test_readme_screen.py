"""The README's screen: what the doctor really says where /dev/shm is small, the port taken and WORLD_RANK misspelt."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import random_model
from tests.doctor.fixtures import REPOSITORY, doctor, failed_checks, report

README = (REPOSITORY / "README.md").read_text()
# A machine of one's own: 2 MiB of shared memory, and a network where port 10000 is taken by this very shell's child.
FAULTS = """\
mount -t tmpfs -o size=2m shm /dev/shm && ip link set lo up || exit 99
"$0" -c 'import socket, time; s = socket.create_server(("0.0.0.0", 10000)); print(flush=True); time.sleep(60)' >"$1" &
until [ -s "$1" ]; do sleep 0.1; done
shift; "$@"; code=$?; kill $!; exit $code
"""


def same(text: str) -> str:
    """One line, whoever holds the port."""
    text = re.sub(r"pid \d+ \([^)]*\)", "pid N", " ".join(text.split()))
    return re.sub(r"kill \d+", "kill N", text)


def test_the_screen_is_what_it_says(tmp_path: Path) -> None:
    screen = same(README.split("<!-- doctor -->")[1].split("<!-- /doctor -->")[0])
    random_model.write(tmp_path / "model")
    env = {"RTP_RUNTIME": "docker", "TP_SIZE": "2", "WROLD_RANK": "0", "CHECKPOINT_PATH": str(tmp_path / "model")}
    inside = ["unshare", "--mount", "--net", "sh", "-c", FAULTS, sys.executable, str(tmp_path / "listens")]
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    done = doctor("-o", "json", env=env, inside=inside)
    answer = report(done)
    assert (list(failed_checks(answer)), done.returncode) == (re.findall(r"× ([A-Z]-\d+)", screen), 1)  # noqa: RUF001
    assert set(failed_checks(answer)) == {"M-13", "S-01", "N-08"}
    for check in (c for c in answer["checks"] if c["id"] in failed_checks(answer)):
        assert same(f"{check['id']} {check['actual']}; expected {check['expected']}") in screen
        assert same(f'seen as "{check["symptom"][0]}" fix {check["fix"]["docker"] or check["fix"]["host"]}') in screen
