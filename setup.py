"""Compiles the CPU kernels when the package is built: into the wheel, or beside the sources of an editable install.

RTP_NATIVE_LEVELS selects the levels of instructions: best (default: the fastest of this CPU), supported, or all.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

PACKAGE = Path("rtp_llm/native")


class BuildKernels(build_py):
    """Adds the libraries to the package. Without a compiler the package works without them."""

    def run(self) -> None:
        super().run()
        folder = Path() if self.editable_mode else Path(self.build_lib)
        build = runpy.run_path(str(PACKAGE / "build.py"))["build"]
        build(os.environ.get("RTP_NATIVE_LEVELS", "best"), folder.resolve() / PACKAGE / "lib")


class PlatformDistribution(Distribution):
    """Makes the wheel one for this platform, since it contains compiled libraries."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels}, distclass=PlatformDistribution)
