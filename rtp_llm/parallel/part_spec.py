"""The part spec: settings, plan and fingerprint (values that must be equal on all parts).

start_server, the main process of a part, writes it to part.json for the other processes of the part.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm import files
from rtp_llm.config import SECRET_FIELDS, Config, TaskType
from rtp_llm.parallel.plan import Plan


@dataclass(frozen=True)
class EmbeddingInfo:
    """How the server makes an embedding from a client's text.

    size: dimensions of the embedding; a request may ask for fewer. normalize: scale it to length 1. prompts: {name:
    text that is put before the client's text}. default_prompt: name of the prompt for requests that choose none; "":
    no prompt.
    """

    size: int = 0
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """Properties of the model that the API process can report before the engine is ready."""

    name: str
    family: str
    dtype: str
    max_positions: int  # tokens
    task: TaskType = "LANGUAGE_MODEL"
    embedding: EmbeddingInfo = EmbeddingInfo()


@dataclass(frozen=True)
class PartSpec:
    """The content of `part.json` in the run directory, and the paths of the other files and sockets there."""

    run_dir: Path
    config: Config
    plan: Plan
    model: ModelInfo
    fingerprint: dict[str, Any]  # values that must be equal on all parts, by name
    tty: bool  # stdout is a terminal

    @property
    def engine_sockets(self) -> list[Path]:
        """Returns the paths of the engines' unix sockets, one per data-parallel group; only DP_SIZE=1 is supported."""
        return [self.run_dir / "engine.sock"]

    @property
    def supervisor_socket(self) -> Path:
        return self.run_dir / "supervisor.sock"

    @property
    def gang_status_path(self) -> Path:
        return self.run_dir / "gang.json"

    @property
    def guard_record_path(self) -> Path:
        return self.run_dir / "guard.json"

    @property
    def verdicts_path(self) -> Path:
        """Returns the path of the file in which the API process records, for each loss of a rank, whether a request
        caused it.
        """
        return self.run_dir / "verdicts.json"

    @property
    def api_alive_path(self) -> Path:
        """Returns the path of the file that the API process touches while its event loop runs."""
        return self.run_dir / "api.alive"

    @property
    def doctor_report_path(self) -> Path:
        """Returns the path of the doctor's last report; doctor/report.py defines its schema."""
        return self.run_dir / "doctor.json"

    @property
    def exit_code_file(self) -> Path:
        """Returns the path of the file with the part's exit code. The guard, which watches the part's processes, writes
        it before it ends the part; start_server reads it.
        """
        return self.run_dir / "exit_code"

    @property
    def shm_prefix(self) -> str:
        """Returns the prefix of this part's files in /dev/shm."""
        return shm_prefix(self.run_dir)

    @property
    def label(self) -> str:
        return f"part{self.plan.part}"

    def save(self) -> None:
        data = {
            "config": self.config.model_dump(exclude=set(SECRET_FIELDS)),
            "plan": asdict(self.plan),
            "model": asdict(self.model),
            "fingerprint": self.fingerprint,
            "tty": self.tty,
        }
        (self.run_dir / "part.json").write_text(json.dumps(data, indent=1))

    @classmethod
    def load(cls, run_dir: Path) -> "PartSpec":
        """Reads part.json. The secrets, which no file contains, come from the environment."""
        data = json.loads(files.read(run_dir / "part.json"))
        secrets = {name: os.environ.get(name.upper(), "") for name in SECRET_FIELDS}
        config, plan = Config.model_validate(data["config"] | secrets), Plan.from_json(data["plan"])
        model = ModelInfo(**data["model"] | {"embedding": EmbeddingInfo(**data["model"]["embedding"])})
        return cls(run_dir, config, plan, model, data["fingerprint"], data["tty"])


def shm_prefix(run_dir: Path) -> str:
    """Returns the prefix of a part's files in /dev/shm, unique per run directory."""
    return f"rtp-llm-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:12]}-"
