"""`python -m tests.gpu.wheels VERSION`: downloads the packages that may be missing on a GPU machine without a network.

The wheels are for that version of Python on Linux, x86-64; tests/constraints.txt gives their versions. The file
`commit` beside them records the commit for a machine that gets the tree without its history.
"""

import shutil
import subprocess
import sys

from tests.gpu.environment import PIP, PREINSTALLED, ROOT, WHEELS, requirements
from tests.gpu.report import read_commit

# pip compares these names literally: a name for a newer libc does not match wheels for an older one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 36, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += [f"manylinux{year}_x86_64" for year in (2014, 2010, 1)]


def main(version: str) -> int:
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    names = sorted(requirements().keys() - PREINSTALLED)
    command = [*PIP, "download", "--quiet", "--only-binary=:all:", "--dest", str(WHEELS), "--python-version", version]
    command += ["--implementation", "cp", "--constraint", str(ROOT / "tests/constraints.txt")]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    completed = subprocess.run([*command, *names], check=False)
    if completed.returncode:
        return completed.returncode
    (WHEELS / "commit").write_text(read_commit())
    wheels = list(WHEELS.glob("*.whl"))
    total_bytes = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels for Python {version}, {total_bytes / 2**20:.0f} MiB: {WHEELS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
