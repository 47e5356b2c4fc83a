"""The input of all checks: this part's settings, plan, checkpoint and GPUs, read by the server's own code.

The plan is the server's derived layout: ranks of this part, addresses of all parts, ports and device. If a setting is
invalid, one check reports it, and the other checks use the most likely value. A typo in TP_SIZE therefore does not hide
a full /dev/shm.
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
from rtp_llm.config import Config, TaskType, load
from rtp_llm.errors import CheckpointError, ConfigError, FatalError
from rtp_llm.hub.name import ModelName
from rtp_llm.hub.settings import localized, missing_models, model_names
from rtp_llm.machine.devices import apply_cuda_visible_devices
from rtp_llm.machine.gpus import DRIVER_TIMEOUT, Gpu, GpuInventory, completes_within, read_gpus
from rtp_llm.model import checkpoint as checkpoints
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.spec import ModelSpec
from rtp_llm.model.task import embedding_info, task_type
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import Plan, check_address, make_plan

# Variables that determine rank, size, port and model. A typo in one of them would start a wrong part.
PLAN_VARIABLES = {
    *("TP_SIZE", "DP_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WORLD_RANK", "WORLD_INDEX", "TP_RANK"),
    *("DISTRIBUTE_CONFIG_FILE", "GANG_CONFIG_STRING", "JSON_GANG_PARTS", "LEADER_ADDRESS", "ZONE_NAME"),
    *("START_PORT", "CHECKPOINT_PATH", "TOKENIZER_PATH", "MODEL_TYPE", "ACT_TYPE"),
}
ANY_GPUS = 1 << 20


@dataclass(frozen=True)
class ParsedConfig:
    """The settings as the server parses them.

    `config`: the settings. An invalid one has its default value. If the name of a variable that determines the plan
    (PLAN_VARIABLES, such as TP_SIZE) has a typo, its value is used as if the name were correct. `config_errors`: one
    error per invalid setting. `misspelled`: pairs of (name that is set, name that was probably meant).
    """

    config: Config
    config_errors: tuple[ConfigError, ...]
    misspelled: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlanResult:
    """The plan (layout of ranks and addresses) that follows from the settings, or the error in the settings.

    `config_error`: why the settings give no valid plan; None if they do. `plan`: if there is an error, a guess of what
    was meant, or None if no guess is consistent. `nat`: a warning if this part's address in the member list is not an
    address of this machine, which is correct only behind NAT; else empty.
    """

    plan: Plan | None
    config_error: ConfigError | None = None
    nat: str = ""


@dataclass
class CheckContext:
    """The input of every check: the machine, the server's settings, and what follows from them. Most values are
    computed when a check first uses them.

    `argv`: the server's command-line flags. `tier`: 1 if checks may load the hardware (compute on GPUs, read from the
    disk), as with --tier 1; else 0.
    """

    host: Host
    argv: Sequence[str] = ()
    tier: int = 0
    gang: GangView | None = None  # reports of all parts; None unless the gang checks run
    gang_failure: str = ""  # why the parts could not exchange reports
    collective: dict[str, Any] | None = None  # result of the all-reduce (doctor/examine.py); None below tier 3
    nvml: Any = field(default=None)  # pynvml, or a fake of it in tests
    ignored: frozenset[str] = frozenset()  # ids of checks whose errors do not skip the checks that need them
    starting: bool = False  # the server starts after this run (--starting)
    running: bool = False  # this part is running, and uses its ports and its memory

    @cached_property
    def parsed_config(self) -> ParsedConfig:
        return parse_config(self.argv, dict(self.host.environ))

    @cached_property
    def config(self) -> Config:
        """Returns the server's settings; an invalid one has its default value.

        If CHECKPOINT_PATH or TOKENIZER_PATH is a Hugging Face name (org/model) and the model is in the local cache, the
        setting is the model's folder in the cache.
        """
        return localized(self.parsed_config.config)

    @cached_property
    def missing_models(self) -> list[ModelName]:
        """Returns the models that CHECKPOINT_PATH and TOKENIZER_PATH name and that the local Hugging Face cache lacks.
        The server downloads them when it starts.
        """
        return missing_models(self.config)

    @cached_property
    def hub_error(self) -> ConfigError | None:
        """Queries the model hub for `missing_models`. Returns why the server could not download one of them (no
        network, no such model, no access, no disk space), or None if it could.
        """
        from rtp_llm.hub.remote import look_up

        try:
            for name in self.missing_models:
                look_up(name).check_space()
        except ConfigError as error:
            return error
        return None

    @cached_property
    def gpus(self) -> GpuInventory:
        """Returns the GPUs of this machine and the driver's versions, read from NVML once for all checks.

        A forked process reads them first. If that process hangs, this one does not call the driver, and the result
        contains an error instead of GPUs.
        """
        visible = self.host.environ.get("CUDA_VISIBLE_DEVICES")
        if self.nvml is None and not completes_within(read_gpus):
            return GpuInventory(failure=DRIVER_TIMEOUT, selection=apply_cuda_visible_devices((), visible))
        return read_gpus(self.nvml, visible)

    @cached_property
    def plan_result(self) -> PlanResult:
        return read_plan(self.config, len(self.gpus.visible), self.host.addresses)

    def preload_with_timeouts(self) -> None:
        """Reads the GPUs, the model cache, the member list (addresses of all parts) and the checkpoint's config.json
        before any check runs, each first in a forked process with a timeout.

        A read from a network disk that does not respond blocks in the kernel and cannot be interrupted, so it must not
        happen in this process. If a read times out, the check of that file or device reports an error.
        """
        _ = self.gpus  # has a timeout of its own
        settings = self.parsed_config.config
        if model_names(settings) and not completes_within(lambda: self.config):
            self.config, self.missing_models, self.checkpoint = settings, [], None
            message = (
                f"CHECKPOINT_PATH={settings.checkpoint_path}: the file system of the cache (HF_HOME) does not respond"
            )
            self.checkpoint_errors = [CheckpointError(message, check="M-08")]
        if not completes_within(lambda: self.plan_result):
            source = self.config.distribute_config_file or "the member list"
            self.plan_result = PlanResult(
                None, ConfigError(f"{source}: cannot be read: the file system does not respond", check="C-02")
            )
        path = self.checkpoint_path
        if path and not completes_within(lambda: files.read(path / "config.json")):
            timed_out = CheckpointError(f"CHECKPOINT_PATH={path}: the file system does not respond", check="M-08")
            self.checkpoint, self.checkpoint_errors = None, [timed_out]

    @property
    def plan(self) -> Plan | None:
        return self.plan_result.plan

    @property
    def on_gpu(self) -> bool:
        """Returns whether the ranks of this part run on GPUs. Without a plan: whether RTP_DEVICE is cuda or, if it is
        not set, CUDA would see a GPU.
        """
        if self.plan:
            return self.plan.device == "cuda"
        return self.config.rtp_device == "cuda" or (not self.config.rtp_device and bool(self.gpus.visible))

    @property
    def used_gpus(self) -> list[Gpu]:
        """Returns the GPUs that the local ranks use; empty if they run on CPU."""
        return self.gpus.visible[: self.local_ranks] if self.on_gpu else []

    @property
    def local_ranks(self) -> int:
        config = self.config
        return self.plan.local_world_size if self.plan else config.local_world_size or config.tp_size or 1

    @property
    def is_multi_part(self) -> bool:
        return bool(self.plan and self.plan.is_multi_part)

    @property
    def members(self) -> tuple[Member, ...]:
        """Returns the parts of the gang whose addresses are configured; empty if there is no valid plan."""
        return self.plan.members if self.plan else ()

    @property
    def local_member(self) -> Member | None:
        return self.plan.member(self.plan.part) if self.plan else None

    @property
    def peers(self) -> list[Member]:
        """Returns the other parts of the gang whose addresses are configured."""
        return [m for m in self.members if m != self.local_member]

    @cached_property
    def nccl(self) -> Nccl:
        return Nccl.read(self.host)

    @cached_property
    def checkpoint_path(self) -> Path | None:
        return Path(self.config.checkpoint_path) if self.config.checkpoint_path else None

    @cached_property
    def checkpoint_errors(self) -> list[CheckpointError]:
        path = self.checkpoint_path
        errors = checkpoints.find_errors(path) if path and path.is_dir() else []
        return errors + ([self.tokenizer_error] if self.tokenizer_error else [])

    @property
    def tokenizer_path(self) -> Path | None:
        """Returns the tokenizer's folder; None if no path is set, if it is yet to be downloaded, or on parts other than
        part 0, which do not read the tokenizer."""
        path = self.config.tokenizer_path or self.config.checkpoint_path
        is_missing = ModelName.parse(path) in self.missing_models
        return Path(path) if path and not is_missing and not (self.plan and self.plan.part) else None

    @cached_property
    def _tokenizer(self) -> tuple[int, CheckpointError | None]:
        try:
            return checkpoints.check_tokenizer(self.tokenizer_path) if self.tokenizer_path else 0, None
        except CheckpointError as error:
            return 0, error

    @property
    def num_tokens(self) -> int:
        """Returns the largest token id in the tokenizer, plus 1; 0 if there is no tokenizer or it cannot be read."""
        return self._tokenizer[0]

    @property
    def tokenizer_error(self) -> CheckpointError | None:
        return self._tokenizer[1]

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

    @property
    def task(self) -> TaskType:
        return task_type(self.config)

    @cached_property
    def embedding_error(self) -> CheckpointError | None:
        """Returns why this checkpoint cannot serve embeddings; None if it can, if its task is not DENSE_EMBEDDING, or
        if it cannot be read, which other checks report.
        """
        if self.checkpoint is None or self.spec is None or self.task != "DENSE_EMBEDDING":
            return None
        try:
            embedding_info(self.checkpoint.path, self.spec.hidden_size)
        except CheckpointError as error:
            return error
        return None


def parse_config(argv: Sequence[str], environ: dict[str, str]) -> ParsedConfig:
    """Parses the server's settings from flags (`argv`) and environment variables, like the server, but does not stop at
    an invalid one: it gets its default value, and an error in the result. If a flag is invalid, ignores all flags.
    """
    errors: list[ConfigError] = []
    corrected: set[str] = set()
    misspelled: tuple[tuple[str, str], ...] = ()
    while True:
        try:
            loaded = load(argv, environ)
        except ConfigError as error:
            # No error for a setting that the user did not set: its value comes from a variable with a typo.
            errors += [] if error.names and set(error.names) <= corrected else [error]
            environ = {name: value for name, value in environ.items() if name not in error.names}
            # The error is in a flag, or names no setting: parse again without any flags.
            if not error.names or any(f"--{name.lower()}" in " ".join(argv) for name in error.names):
                argv = ()
            continue
        misspelled = misspelled or loaded.misspelled
        typos = {
            meant: name for name, meant in misspelled if meant in PLAN_VARIABLES - corrected and meant not in environ
        }
        if not typos:
            return ParsedConfig(loaded.config, tuple(errors), misspelled)
        environ = environ | {meant: environ[name] for meant, name in typos.items() if name in environ}
        corrected |= typos.keys()


def read_plan(config: Config, num_gpus: int, addresses: set[str]) -> PlanResult:
    """Returns the plan (layout of ranks and addresses) that follows from the settings. If they are inconsistent,
    returns a guess of the plan and the error with which the server would exit.

    `num_gpus`: number of GPUs that CUDA sees. `addresses`: IP addresses of this machine.
    """
    try:
        plan = make_plan(config, num_gpus)
        return PlanResult(plan, nat=check_address(plan, addresses) or "")
    except ConfigError as error:
        return PlanResult(_guess_plan(config, num_gpus, addresses), error)


def _guess_plan(config: Config, num_gpus: int, addresses: set[str]) -> Plan | None:
    """Returns the first consistent plan that results if this part's rank, the number of visible GPUs, or both are
    replaced by other values; None if there is none."""
    ranks = range(config.world_size or config.tp_size or 1)
    derived = {"world_index": None, "tp_rank": None}
    candidates = [config, *(config.model_copy(update=derived | {"world_rank": rank}) for rank in ranks)]
    for visible in (num_gpus, ANY_GPUS):
        for candidate in candidates:
            try:
                plan = make_plan(candidate, visible)
                check_address(plan, addresses)
            except ConfigError:
                continue
            return plan
    return None
