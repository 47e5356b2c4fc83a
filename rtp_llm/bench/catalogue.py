"""The targets that can be compared, by name: this server and other engines (peers), all with the same checkpoint.

A name is KIND-PRECISION, such as `ours-bf16` or `openvino-int8`; `ours` is this server. Settings follow an `@`:
`ours-bf16@ITL_BUDGET_MS=50+TP_SIZE=2`. The setting PYTHON selects the Python of another installation, such as that of
another checkout.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rtp_llm.bench.target import EngineTarget, ServerTarget, Target, free_port, own_server
from rtp_llm.bench.worker_process import run_module
from rtp_llm.errors import ConfigError

OWN_SETTINGS = {
    "bf16": {},
    "fp32": {"ACT_TYPE": "fp32"},
    "int8": {"QUANTIZATION": "INT8"},
    "w8a8": {"QUANTIZATION": "W8A8"},
    "int4": {"QUANTIZATION": "INT4"},
}
PRECISIONS_OF = {
    "ours": tuple(OWN_SETTINGS),
    "offline": tuple(OWN_SETTINGS),
    "openvino": ("bf16", "int8"),
    "llama": ("f16", "q8_0", "q4_0"),
    "vllm": ("bf16",),
    "transformers": ("bf16",),
}
# Bits per weight; targets with the same number are compared.
GROUPS = {"fp32": "fp32", "bf16": "16", "f16": "16", "int8": "8", "w8a8": "8", "q8_0": "8", "int4": "4", "q4_0": "4"}
ALL_NAMES = tuple(f"{kind}-{precision}" for kind, all_of in PRECISIONS_OF.items() for precision in all_of)
DEFAULT_NAMES = tuple(name for name in ALL_NAMES if name not in ("ours-fp32", "ours-int8") and "offline" not in name)


class AbsentError(Exception):
    """A peer (another engine to compare with) is not installed. The message names what is missing."""


@dataclass(frozen=True)
class TargetName:
    """The name of a target (an engine to measure, with its precision), parsed."""

    text: str
    kind: str
    precision: str
    settings: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "TargetName":
        """Parses a target's name with its settings. Raises ConfigError if the name is unknown."""
        name, _, settings = text.partition("@")
        kind, _, precision = name.partition("-")
        if precision not in PRECISIONS_OF.get(kind, ()):
            raise ConfigError(f"--targets {text}: unknown; allowed: {', '.join(ALL_NAMES)}")
        pairs = [pair.partition("=") for pair in settings.split("+") if pair]
        return cls(text, kind, precision, {key: value for key, _, value in pairs})


@dataclass(frozen=True)
class Catalogue:
    """Creates targets (engines to measure) by name.

    checkpoint  folder of the model that all targets run
    pythons     Python interpreters in which to look for peers (other engines), in this order
    folder      folder for logs and for converted weights, which later benchmarks use again
    """

    checkpoint: Path
    pythons: tuple[str, ...]
    folder: Path

    def make(self, name: TargetName) -> Target:
        """Returns the target; enter it as a context manager to start it. Raises AbsentError if its engine is not
        installed.
        """
        makers = {
            "ours": self._ours,
            "offline": self._offline,
            "openvino": self._openvino,
            "llama": self._llama,
            "vllm": self._vllm,
            "transformers": self._transformers,
        }
        return makers[name.kind](name)

    def _ours(self, name: TargetName) -> Target:
        settings = OWN_SETTINGS[name.precision] | name.settings
        python = settings.pop("PYTHON", sys.executable)
        return own_server(name.text, self.checkpoint, self._log(name), settings, python)

    def _offline(self, name: TargetName) -> Target:
        return EngineTarget(name.text, "offline", self.checkpoint, OWN_SETTINGS[name.precision] | name.settings)

    def _openvino(self, name: TargetName) -> Target:
        file = self._gguf("f16" if name.precision == "bf16" else "q8_0")
        settings = {"INFERENCE_PRECISION_HINT": "bf16"}
        return EngineTarget(name.text, "openvino", file, settings, self._python("openvino_genai"))

    def _llama(self, name: TargetName) -> Target:
        program = shutil.which("llama-server")
        if not program:
            raise AbsentError("llama-server is not on PATH; install llama.cpp")
        port, file = free_port(), self._gguf(name.precision)
        options = ["--ctx-size", "65536", "--parallel", "32", "--no-webui", "--log-disable"]
        command = [program, "--model", str(file), "--port", str(port), *options]
        return ServerTarget(name.text, command, port, self._log(name))

    def _vllm(self, name: TargetName) -> Target:
        port = free_port()
        options = ["--dtype=bfloat16", "--served-model-name=bench", "--max-model-len=10240", f"--port={port}"]
        program = str(Path(self._python("vllm")).with_name("vllm"))
        command = [program, "serve", str(self.checkpoint), *options]
        return ServerTarget(name.text, command, port, self._log(name), {"VLLM_CPU_KVCACHE_SPACE": "2"})

    def _transformers(self, name: TargetName) -> Target:
        return EngineTarget(name.text, "transformers", self.checkpoint, {}, self._python("transformers", "torch"))

    def _log(self, name: TargetName) -> Path:
        return self.folder / f"{name.kind}-{name.precision}.log"

    def _gguf(self, type_name: str) -> Path:
        """Returns the checkpoint as a GGUF file, which is written if it is missing or older than the checkpoint."""
        newest = max(file.stat().st_mtime for file in self.checkpoint.glob("*.safetensors"))
        file = self.folder / f"{self.checkpoint.name}-{type_name}.gguf"
        if not file.exists() or file.stat().st_mtime < newest:
            partial = file.with_suffix(".partial")
            run_module(
                self._python("gguf"), "rtp_llm.bench.peers.gguf_file", str(self.checkpoint), str(partial), type_name
            )
            partial.rename(file)
        return file

    def _python(self, *packages: str) -> str:
        """Returns the first Python that has the packages. Raises AbsentError if there is none."""
        code = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))"
        for python in self.pythons:
            try:
                if subprocess.run([python, "-c", code, *packages], check=False).returncode == 0:
                    return python
            except OSError as error:
                raise ConfigError(f"--peer-python {python}: cannot be run: {error.strerror}") from None
        raise AbsentError(
            f"no package {', '.join(packages)} in {', '.join(self.pythons)}; install it there, or name a Python that"
            " has it with --peer-python"
        )


def weight_precision(name: TargetName) -> str:
    """Returns the key of `bound.PRECISIONS` that describes a target's weights. For OpenVINO's int8 this is "q8_0",
    llama.cpp's 8-bit format, because both quantize activations, too.
    """
    if name.kind == "openvino" and name.precision == "int8":
        return "q8_0"
    return {"f16": "bf16"}.get(name.precision, name.precision)
