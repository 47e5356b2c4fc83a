"""Generates supervisord's configuration for one part from the plan.

supervisord stops groups one after another, highest priority number first, and all programs of a group together. So
the API process finishes its open streams while the ranks still compute; then all ranks stop at once, and then the
coordinator.
"""

import configparser
import io
import shlex
import sys

from rtp_llm.parallel.part_spec import PartSpec

RANK_STOP_SECONDS = 5
DRAIN_MARGIN_SECONDS = 5  # that the API process may take beyond SHUTDOWN_TIMEOUT


def supervisord_config(part_spec: PartSpec) -> str:
    """Returns the text of supervisord.conf."""
    run_dir, socket = part_spec.run_dir, part_spec.supervisor_socket
    run_dir_arg = shlex.quote(str(run_dir))
    # One worker per rank and a spare, which takes the place of a lost one while that is restarted.
    num_workers = part_spec.plan.local_world_size + (part_spec.config.rtp_recovery == "reform")
    workers = {f"worker{i}": f"rtp_llm.engine.main {run_dir_arg} {i}" for i in range(num_workers)}
    api_stop_seconds = part_spec.config.drain_seconds + DRAIN_MARGIN_SECONDS
    sections: dict[str, dict[str, object]] = {
        "supervisord": {
            "nodaemon": "true",
            "logfile": run_dir / "supervisord.log",
            "silent": "true",  # start_server shows the end of the log file if supervisord fails
            "loglevel": "info",
            "pidfile": run_dir / "supervisord.pid",
            "childlogdir": run_dir,
            "identifier": part_spec.label,
        },
        "unix_http_server": {"file": socket, "chmod": "0700"},
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
        "group:ranks": {"programs": ",".join(workers), "priority": 100},
        "group:service": {"programs": "api", "priority": 900},
        "program:api": _program(f"rtp_llm.api.server {run_dir_arg}", api_stop_seconds),
        "eventlistener:guard": {
            **_program(f"rtp_llm.supervise.guard {run_dir_arg}", 2),
            "events": "PROCESS_STATE_RUNNING,PROCESS_STATE_EXITED,PROCESS_STATE_FATAL",
            "buffer_size": 1000,
            "autorestart": "true",
            "redirect_stderr": "false",
            "stderr_logfile": "/dev/fd/2",
            "stderr_logfile_maxbytes": 0,
        },
    }
    if part_spec.plan.part == 0:
        sections["group:gang"] = {"programs": "coordinator", "priority": 40}
        sections["program:coordinator"] = _program(f"rtp_llm.parallel.coordinator {run_dir_arg}", 2)
    if runs_doctor(part_spec):
        sections["group:doctor"] = {"programs": "gang-doctor", "priority": 50}
        sections["program:gang-doctor"] = _program(f"doctor.gang_service {run_dir_arg}", 2)
    del sections["eventlistener:guard"]["stdout_logfile"], sections["eventlistener:guard"]["stdout_logfile_maxbytes"]
    sections |= {f"program:{name}": _program(command, RANK_STOP_SECONDS) for name, command in workers.items()}
    return _render(sections)


def runs_doctor(part_spec: PartSpec) -> bool:
    """Returns whether a doctor process, which checks the parts against each other, runs next to the ranks: it does if
    the gang has several parts and RTP_DOCTOR is not off.
    """
    return part_spec.plan.is_multi_part and part_spec.config.rtp_doctor != "off"


def _program(arguments: str, stop_seconds: int) -> dict[str, object]:
    """Returns the options of one program (process) in supervisord.conf.

    Disables supervisord's own restarts, which have no limit or delay; the guard restarts programs instead.
    """
    return {
        "command": f"{shlex.quote(sys.executable)} -m rtp_llm.supervise.program {arguments}",
        "autostart": "true",
        "autorestart": "false",
        "startsecs": 0,
        "startretries": 0,
        "exitcodes": 0,
        "stopasgroup": "true",
        "killasgroup": "true",
        "stopwaitsecs": stop_seconds,
        "redirect_stderr": "true",
        "stdout_logfile": "/dev/fd/1",
        "stdout_logfile_maxbytes": 0,
    }


def _render(sections: dict[str, dict[str, object]]) -> str:
    parser = configparser.RawConfigParser()
    for name, options in sections.items():
        # supervisord expands %(…)s in values: escape a % in a path as %%.
        parser[name] = {key: str(value).replace("%", "%%") for key, value in options.items()}
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()
