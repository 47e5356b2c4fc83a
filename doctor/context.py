"""This part as the server would see it: settings, plan, checkpoint, read by the server's own code.

Where a setting is wrong, the check that it belongs to says so, and the others go on with what was most likely meant:
one typing slip must not hide a full /dev/shm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from doctor.gang.view import GangView
from doctor.host import Host
from doctor.nccl import Nccl
from rtp_llm import files
from rtp_llm.config import Config, load
from rtp_llm.errors import CheckpointError, ConfigError, FatalError
from rtp_llm.machine.devices import apply_cuda_visible_devices
from rtp_llm.machine.gpus import DRIVER_TIMEOUT, Gpu, GpuInventory, completes_within, read_gpus
from rtp_llm.model import checkpoint as checkpoints
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import Plan, check_address, make_plan

# A slip in one of these gives this part another place, another size or another model, in silence.
PLAN_VARIABLES = {
    *("TP_SIZE", "DP_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WORLD_RANK", "WORLD_INDEX", "TP_RANK"),
    *("DISTRIBUTE_CONFIG_FILE", "GANG_CONFIG_STRING", "JSON_GANG_PARTS", "LEADER_ADDRESS", "ZONE_NAME"),
    *("START_PORT", "CHECKPOINT_PATH", "TOKENIZER_PATH", "MODEL_TYPE", "ACT_TYPE"),
}
ANY_GPUS = 1 << 20


@dataclass(frozen=True)
class ParsedConfig:
    """`config` holds what is valid, typing slips in decisive names undone; `faults` say what is not."""

    config: Config
    config_errors: tuple[ConfigError, ...]
    misspelled: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlanResult:
    """`plan` is the likely one where `fault` says that there is none; None where nothing can be guessed."""

    plan: Plan | None
    config_error: ConfigError | None = None
    nat: str = ""  # why the plan's address is not one of ours


@dataclass
class CheckContext:
    """`tier`: how far the doctor was asked to go. `gang`: what the parts told each other, from tier 2 on."""

    host: Host
    argv: Sequence[str] = ()
    tier: int = 0
    gang: GangView | None = None
    gang_failure: str = ""  # why the parts could not be asked
    collective: dict[str, Any] | None = None
    nvml: Any = field(default=None)  # pynvml, or what stands for it in a test
    ignored: frozenset[str] = frozenset()  # ids whose errors stop nothing
    starting: bool = False  # a start follows at once
    running: bool = False  # this part is running: what holds its ports and its memory is itself

    @cached_property
    def parsed_config(self) -> ParsedConfig:
        return parse_config(self.argv, dict(self.host.environ))

    @property
    def config(self) -> Config:
        return self.parsed_config.config

    @cached_property
    def gpus(self) -> GpuInventory:
        """Read here, for all checks; only after a process that may be killed has seen that the driver answers."""
        visible = self.host.environ.get("CUDA_VISIBLE_DEVICES")
        if self.nvml is None and not completes_within(read_gpus):
            return GpuInventory(failure=DRIVER_TIMEOUT, selection=apply_cuda_visible_devices((), visible))
        return read_gpus(self.nvml, visible)

    @cached_property
    def plan_result(self) -> PlanResult:
        return read_plan(self.config, len(self.gpus.visible), self.host.addresses)

    def preload_with_timeouts(self) -> None:
        """A dead network disk holds whoever reads from it, and nobody kills this process: what gives no answer to one
        that is killed is a fault, and is not asked for again."""
        _ = self.gpus  # asked for in that way by itself
        if not completes_within(lambda: self.plan_result):
            source = self.config.distribute_config_file or "the member list"
            self.plan_result = PlanResult(
                None, ConfigError(f"{source}: cannot be read: it gives no answer", check="C-02")
            )
        path = self.checkpoint_path
        if path and not completes_within(lambda: files.read(path / "config.json")):
            hung = CheckpointError(f"CHECKPOINT_PATH={path}: its disk gives no answer", check="M-08")
            self.checkpoint, self.checkpoint_errors = None, [hung]

    @property
    def plan(self) -> Plan | None:
        return self.plan_result.plan

    @property
    def on_gpu(self) -> bool:
        """Whether this part is to run on GPUs, by what can be told."""
        if self.plan:
            return self.plan.device == "cuda"
        return self.config.rtp_device == "cuda" or bool(self.gpus.visible)

    @property
    def used_gpus(self) -> list[Gpu]:
        """Returns the GPUs that the local ranks use; empty if they run on CPU."""
        return self.gpus.visible[: self.local_ranks] if self.on_gpu else []

    @property
    def local_ranks(self) -> int:
        config = self.config
        return self.plan.local_world_size if self.plan else config.local_world_size or config.tp_size or 1

    @property
    def peers(self) -> list[Member]:
        """The members of the other parts, those whose address is known."""
        return [m for m in self.plan.members if m.index != self.plan.part] if self.plan else []

    @cached_property
    def nccl(self) -> Nccl:
        return Nccl.read(self.host)

    @cached_property
    def checkpoint_path(self) -> Path | None:
        return Path(self.config.checkpoint_path) if self.config.checkpoint_path else None

    @cached_property
    def checkpoint_errors(self) -> list[CheckpointError]:
        path = self.checkpoint_path
        found = checkpoints.find_errors(path) if path and path.is_dir() else []
        return found + ([self.tokenizer_error] if self.tokenizer_error else [])

    @property
    def tokenizer_path(self) -> Path | None:
        """Where this part reads the tokenizer; None where it reads none."""
        place = self.config.tokenizer_path or self.config.checkpoint_path
        return Path(place) if place and not (self.plan and self.plan.part) else None

    @cached_property
    def tokenizer_error(self) -> CheckpointError | None:
        try:
            if self.tokenizer_path:
                checkpoints.check_tokenizer(self.tokenizer_path)
        except CheckpointError as error:
            return error
        return None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        try:
            return Checkpoint.open(self.config)
        except FatalError:
            return None

    @cached_property
    def _spec(self) -> tuple[ModelSpec | None, FatalError | None]:
        try:
            return (self.checkpoint.spec(self.config), None) if self.checkpoint else (None, None)
        except FatalError as error:
            return None, error

    @property
    def spec(self) -> ModelSpec | None:
        return self._spec[0]

    @property
    def spec_error(self) -> FatalError | None:
        return self._spec[1]


def parse_config(argv: Sequence[str], environ: dict[str, str]) -> ParsedConfig:
    """What can be read of flags and environment, and every reason why the rest cannot."""
    faults: list[ConfigError] = []
    corrected: set[str] = set()
    misses: tuple[tuple[str, str], ...] = ()
    while True:
        try:
            loaded = load(argv, environ)
        except ConfigError as fault:
            # What was only put there as the likely meaning of a slip is not the operator's fault.
            faults += [] if fault.names and set(fault.names) <= corrected else [fault]
            environ = {name: value for name, value in environ.items() if name not in fault.names}
            # A flag, and not a variable, or still the same fault: no flag can be believed.
            if not fault.names or any(f"--{name.lower()}" in " ".join(argv) for name in fault.names):
                argv = ()
            continue
        misses = misses or loaded.misspelled
        slips = {
            meant: given for given, meant in misses if meant in PLAN_VARIABLES - corrected and meant not in environ
        }
        if not slips:
            return ParsedConfig(loaded.config, tuple(faults), misses)
        environ = environ | {meant: environ[given] for meant, given in slips.items() if given in environ}
        corrected |= slips.keys()


def read_plan(config: Config, gpus: int, addresses: set[str]) -> PlanResult:
    """The plan, or the fault that the server would end with and the plan that was likely meant."""
    try:
        plan = make_plan(config, gpus)
        return PlanResult(plan, nat=check_address(plan, addresses) or "")
    except ConfigError as fault:
        return PlanResult(_guess_plan(config, gpus, addresses), fault)


def _guess_plan(config: Config, gpus: int, addresses: set[str]) -> Plan | None:
    """Another rank of this part, or more GPUs than there are: the first that leaves no contradiction."""
    ranks = range(config.world_size or config.tp_size or 1)
    free = {"world_index": None, "tp_rank": None}
    candidates = [config, *(config.model_copy(update=free | {"world_rank": rank}) for rank in ranks)]
    for shown in (gpus, ANY_GPUS):
        for candidate in candidates:
            try:
                plan = make_plan(candidate, shown)
                check_address(plan, addresses)
            except ConfigError:
                continue
            return plan
    return None
