"""`python -m tests.gpu.wheels VERSION`: downloads the packages that a GPU machine without a network may lack.

The wheels fit that version of Python on Linux, x86-64. Their versions come from tests/constraints.txt. A file beside
them holds the commit, for a machine that gets the tree without its history.
"""

import shutil
import subprocess
import sys

from tests.gpu.environment import NOT_CARRIED, PIP, ROOT, WHEELS, needs
from tests.gpu.report import commit

# pip compares these names literally: it does not find a wheel for an older libc by the name of a newer one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 36, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += [f"manylinux{year}_x86_64" for year in (2014, 2010, 1)]


def main(version: str) -> int:
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    names = sorted(needs().keys() - NOT_CARRIED)
    command = [*PIP, "download", "--quiet", "--only-binary=:all:", "--dest", str(WHEELS), "--python-version", version]
    command += ["--implementation", "cp", "--constraint", str(ROOT / "tests/constraints.txt")]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *names], check=False)
    if done.returncode:
        return done.returncode
    (WHEELS / "commit").write_text(commit())
    found = list(WHEELS.glob("*.whl"))
    print(f"{len(found)} wheels for Python {version}, {sum(w.stat().st_size for w in found) / 2**20:.0f} MiB: {WHEELS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
