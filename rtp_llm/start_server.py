"""`python3 -m rtp_llm.start_server`: the main process of one part.

Validates all input that can be checked without a GPU, writes part.json (settings and plan, for the other processes of
the part), runs supervisord and forwards signals to it. Exits with a code for the reason, because supervisord itself
always exits with 0.
"""

import fcntl
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rtp_llm import __version__
from rtp_llm import log as logs
from rtp_llm.config import Config, load
from rtp_llm.errors import ConfigError, DoctorError, ExitCode, FatalError
from rtp_llm.hub.name import commit_fingerprint
from rtp_llm.hub.settings import localized, missing_models
from rtp_llm.machine.devices import local_addresses, visible_gpus
from rtp_llm.machine.process import MIN_OPEN_FILES, die_with_parent, stopping_file
from rtp_llm.model.checkpoint import Checkpoint, check_tokenizer
from rtp_llm.model.spec import ModelSpec
from rtp_llm.model.task import embedding_info, task_type
from rtp_llm.parallel.part_spec import EmbeddingInfo, ModelInfo, PartSpec
from rtp_llm.parallel.plan import Plan, check_address, make_plan
from rtp_llm.parallel.ports import port_conflict
from rtp_llm.supervise.supervisord import supervisord_config

log = logging.getLogger("rtp_llm.start_server")

SHM = Path("/dev/shm")
DOCTOR_TIMEOUT_SECONDS = 60
WAKE_TIMEOUT_SECONDS = 5
MAX_OPEN_FILES = 1 << 20  # some programs close all file descriptors up to the limit, so it must not be huge


def main() -> int:
    """Runs the part until it ends. Returns its exit code."""
    _append_to_stdout()
    logs.setup("start_server")
    forwarder = SignalForwarder()
    try:
        loaded = load(sys.argv[1:], os.environ)
        logs.setup("start_server", loaded.config.log_level, style=loaded.config.log_format)
        for note in loaded.notes:
            log.info("%s", note)
        for warning in loaded.warnings:
            log.warning("%s", warning)
        loaded.check_access()
        raise_open_files_limit()
        plan = make_plan(loaded.config, visible_gpus())
        nat_warning = check_address(plan, local_addresses())
        if nat_warning:
            log.warning("%s", nat_warning)
        if missing_models(loaded.config) and (download_exit_code := _download(loaded.config, plan)):
            return download_exit_code
        config = localized(loaded.config)
        if config != loaded.config:
            log.info(
                "CHECKPOINT_PATH=%s: using the cached snapshot %s",
                loaded.config.checkpoint_path,
                config.checkpoint_path,
            )
        checkpoint, spec = _check_model(config, plan)
        _check_ports_free(plan)
        with _run_dir(config) as run_dir:
            part_spec = PartSpec(
                run_dir=run_dir,
                config=config,
                plan=plan,
                model=_model_info(config, spec),
                fingerprint=_fingerprint(config, plan, checkpoint, spec),
                tty=sys.stdout.isatty(),
            )
            _check_with_doctor(config, part_spec.doctor_report_path)
            return _supervise(part_spec, forwarder)
    except FatalError as error:
        if not isinstance(error, DoctorError):  # the doctor reports all errors, this exception only the first
            _run_doctor_process(os.environ.get("RTP_DOCTOR", ""))
        log.critical("%s", error)
        return error.exit_code


def _append_to_stdout() -> None:
    """Sets O_APPEND on stdout.

    supervisord reopens its stdout for each program. If stdout is a file, programs would otherwise overwrite each
    other's lines.
    """
    fd = sys.stdout.fileno()
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)


def _download(config: Config, plan: Plan) -> int:
    """Downloads the models that the settings name, in a process that serves /health meanwhile. Returns its exit code.

    First checks for errors that would make the download, or the start after it, fail.
    """
    from rtp_llm.hub.remote import look_up

    _check_ports_free(plan)
    for name in missing_models(config):
        look_up(name).check_space()
    _check_with_doctor(config)
    command = [sys.executable, "-m", "rtp_llm.api.download", *sys.argv[1:]]
    return subprocess.run(command, preexec_fn=die_with_parent, check=False).returncode


def _check_model(config: Config, plan: Plan) -> tuple[Checkpoint, ModelSpec]:
    """Reads the checkpoint's headers, and validates TP size, model and tokenizer against each other."""
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    spec.check_tp(plan.tp_size)
    tokenizer = Path(config.tokenizer_path or config.checkpoint_path)
    if plan.part == 0 and not tokenizer.is_dir():
        raise ConfigError(f"TOKENIZER_PATH={tokenizer}: is not a folder; allowed: a folder with tokenizer.json")
    if plan.part == 0:
        check_tokenizer(tokenizer)
    return checkpoint, spec


def _model_info(config: Config, spec: ModelSpec) -> ModelInfo:
    task = task_type(config)
    is_embedding = task == "DENSE_EMBEDDING"
    embedding = embedding_info(Path(config.checkpoint_path), spec.hidden_size) if is_embedding else EmbeddingInfo()
    return ModelInfo(config.served_model_names[0], spec.family, spec.dtype, spec.max_positions, task, embedding)


def _fingerprint(config: Config, plan: Plan, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """Returns the values that must be equal on all parts, by name. A difference is reported as one line per name."""
    settings = {f"config.{name}": value for name, value in config.shared().items()}
    model = spec.fingerprint(checkpoint.digest) | commit_fingerprint(checkpoint.path)
    return {"version": __version__} | plan.fingerprint() | model | settings


def _check_ports_free(plan: Plan) -> None:
    """Raises ConfigError with the port, its purpose and its current owner if a planned port is in use."""
    for planned in plan.local_ports():
        conflict = port_conflict(planned)
        if conflict:
            raise ConfigError(
                f"port {planned.port}, wanted for {planned.purpose}: {conflict}; free it or choose another START_PORT",
                check="N-08",
            )


def _check_with_doctor(config: Config, report: Path | None = None) -> None:
    """Runs the doctor. Raises DoctorError if it finds an error and may prevent the start."""
    if _run_doctor_process(config.rtp_doctor, report) == 1 and config.rtp_doctor == "enforce":
        raise DoctorError("the doctor found the errors above; fix them, or set RTP_DOCTOR=warn to start anyway")


def _run_doctor_process(mode: str, report: Path | None = None) -> int:
    """Runs the doctor on this part in a separate process and logs its findings. Returns its exit code, 1 for errors.

    Incomplete results (exit code 3) or a crash of the doctor are only logged: they do not prevent a start.
    `mode`: RTP_DOCTOR. `report`: path of the JSON report, for GET /doctor and the doctor that checks the gang.
    """
    if mode == "off":
        return 0
    save = ("--save", str(report)) if report else ()
    command = [sys.executable, "-m", "doctor", "--starting", *save, "--", *sys.argv[1:]]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        log.warning("the doctor did not finish within %d s; starting without its checks", DOCTOR_TIMEOUT_SECONDS)
        return 0
    if completed.returncode not in (0, 1, 3):
        reason = completed.stderr.strip() or f"it exited with {completed.returncode}"
        log.warning("the doctor could not run: %s", reason)
    elif completed.returncode == 0 and " warning" not in completed.stdout:
        log.info("doctor: %s", completed.stdout.strip().splitlines()[-1])
    else:
        log.warning("doctor:\n%s", completed.stdout.rstrip())
    return completed.returncode


@contextmanager
def _run_dir(config: Config) -> Iterator[Path]:
    """Yields RTP_RUN_DIR, or a temporary folder that is removed at the end.

    Its path is short, because a unix socket path has at most 107 bytes.
    """
    if not config.rtp_run_dir:
        try:
            parent = tempfile.gettempdir()
        except FileNotFoundError:
            raise ConfigError("no temporary folder is writable; mount a tmpfs at /tmp", check="L-11") from None
        path = Path(tempfile.mkdtemp(prefix="rtp-llm-", dir=parent if len(parent) <= 60 else "/tmp"))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
        return
    path = Path(config.rtp_run_dir).absolute()
    if len(str(path)) > 80:
        raise ConfigError(f"RTP_RUN_DIR={path}: too long for unix sockets; allowed: up to 80 characters")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"RTP_RUN_DIR={path}: cannot be created: {error.strerror}") from None
    for stale in (
        *("exit_code", "doctor.json", "gang.json", "guard.json", "epoch", "verdicts.json", "api.alive", "stopping"),
        *("engine.sock", "supervisor.sock"),
    ):
        (path / stale).unlink(missing_ok=True)
    yield path


def _remove_stale_segments(prefix: str) -> None:
    """Removes the shared-memory files of ranks that were killed before they could unlink them."""
    for stale in SHM.glob(f"{prefix}*"):
        stale.unlink(missing_ok=True)


def raise_open_files_limit() -> None:
    """Raises the soft limit of open files to the hard limit. It is often 1024, and each connection is a file.

    Raises ConfigError if the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        raise ConfigError(
            f"this process may open only {hard} files, its hard limit; needed: at least {MIN_OPEN_FILES}; raise it with"
            " `ulimit -n 1048576` in the shell of root that starts the server, or with `docker run --ulimit"
            " nofile=1048576:1048576`",
            check="L-02",
        )
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _supervise(part_spec: PartSpec, forwarder: "SignalForwarder") -> int:
    part_spec.save()
    conf = part_spec.run_dir / "supervisord.conf"
    conf.write_text(supervisord_config(part_spec))
    plan = part_spec.plan
    log.info(
        "%s: ranks %d-%d of %d on %s, HTTP on port %d, state in %s",
        part_spec.label,
        plan.ranks.start,
        plan.ranks.stop - 1,
        plan.world_size,
        plan.device,
        plan.start_port,
        part_spec.run_dir,
    )
    forwarder.defer()
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(conf)],
        **_child_stdio(),
        start_new_session=True,  # Ctrl-C then signals only this process, which stops the others in order
        preexec_fn=die_with_parent,
    )
    forwarder.set_child(child, part_spec.run_dir)
    _wake(child, part_spec.supervisor_socket)
    code = child.wait()
    _remove_stale_segments(part_spec.shm_prefix)
    if part_spec.exit_code_file.exists():
        return int(part_spec.exit_code_file.read_text())
    if forwarder.num_signals and code <= 0:  # < 0: by a signal before its handlers were set, or by the third
        return ExitCode.OK
    log.critical(
        "supervisord exited with %d without a stop signal; end of its log:\n%s",
        code,
        _tail(part_spec.run_dir / "supervisord.log"),
    )
    return ExitCode.RANK_CRASHED


def _wake(child: "subprocess.Popen[bytes]", supervisor_socket: Path) -> None:
    """Connects to supervisord once it listens: it starts its programs after its first event, or after a second."""
    deadline = time.monotonic() + WAKE_TIMEOUT_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(supervisor_socket))
                return
        except OSError:
            time.sleep(0.01)


def _child_stdio() -> dict[str, Any]:
    """Returns the arguments `stdout` and `stderr` of the subprocess.Popen call that starts supervisord.

    supervisord reopens its stdout for each program, which fails on a socket (systemd-journald). In that case they are a
    pipe to `cat`, which this function starts.
    """
    try:
        os.close(os.open("/dev/fd/1", os.O_WRONLY | os.O_APPEND))
    except OSError:
        relay = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
        return {"stdout": relay.stdin, "stderr": relay.stdin}
    return {}


def _tail(path: Path, lines: int = 10) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(none)"


class SignalForwarder:
    """Forwards SIGTERM, SIGINT and SIGHUP to supervisord.

    The first two signals that arrive are forwarded as SIGTERM, which stops the part gracefully; the third as SIGKILL.
    """

    def __init__(self) -> None:
        """Installs the handlers. Before `defer` or `set_child`, a signal ends this process with exit code 0."""
        self.num_signals = 0
        self._deferred = False
        self._child: subprocess.Popen[bytes] | None = None
        self._run_dir = Path()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def defer(self) -> None:
        """Counts the signals that arrive from now on, instead of acting on them. `set_child` forwards them.

        Call it before forking a child: while Python forks, it discards any exception that a signal handler raises, even
        SystemExit.
        """
        self._deferred = True

    def set_child(self, child: "subprocess.Popen[bytes]", run_dir: Path) -> None:
        self._child, self._run_dir = child, run_dir
        if self.num_signals:
            self._forward(child)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.num_signals += 1
        if self._child:
            if self.num_signals == 1:
                log.info("received %s: open streams finish, then the ranks stop", signal.Signals(number).name)
            self._forward(self._child)
        elif not self._deferred:
            sys.exit(ExitCode.OK)

    def _forward(self, child: "subprocess.Popen[bytes]") -> None:
        stopping_file(self._run_dir).touch()
        child.send_signal(signal.SIGTERM if self.num_signals < 3 else signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
