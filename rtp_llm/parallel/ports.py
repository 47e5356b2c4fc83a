"""Checks that planned ports are free, and names the process that has a port in use."""

import errno
import socket

import psutil

from rtp_llm.machine.command_line import redacted_command
from rtp_llm.parallel.plan import PlannedPort


def port_conflict(planned: PlannedPort) -> str:
    """Returns why listening on this port fails, such as "in use by pid 7 (nginx: master …)"; empty if it works."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((planned.host, planned.port))
            probe.listen()
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            return f"in use{_port_owner(planned.port)}" if in_use else str(error.strerror)
    return ""


def _port_owner(port: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return " by a process that only root can see"
    pid = next((c.pid for c in connections if c.laddr and c.laddr.port == port and c.status == "LISTEN"), None)
    if pid is None:
        return " by a process that is not visible in this container"
    try:
        return f" by pid {pid} ({redacted_command(psutil.Process(pid).cmdline())})"
    except psutil.Error:
        return f" by pid {pid}"
