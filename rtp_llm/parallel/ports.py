"""Checks that planned ports are free, and names the process that has a port in use."""

import errno
import socket

import psutil

from rtp_llm.errors import ConfigError
from rtp_llm.machine.command_line import redacted_command
from rtp_llm.machine.devices import local_addresses
from rtp_llm.machine.listen_addresses import listen_addresses, listen_on
from rtp_llm.parallel.plan import Plan, PlannedPort
from rtp_llm.parallel.wire import listen


def port_conflict(planned: PlannedPort) -> str:
    """Returns why this process cannot listen on a planned port, such as "in use by pid 7 (nginx: master …)"; if it can,
    an empty text.

    Raises ConfigError if the planned host is not an address of this machine.
    """
    for address in listen_addresses(planned.host):
        try:
            listen_on(address, planned.port).close()
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            return f"in use{_port_owner(planned.port)}" if in_use else str(error.strerror)
    return ""


def listen_as_planned(planned: PlannedPort) -> socket.socket:
    """Listens on a port of the plan. Raises ConfigError with the port, its purpose and its current owner."""
    try:
        return listen(planned.host, planned.port)
    except OSError as error:
        raise ConfigError(
            f"port {planned.port}, wanted for the {planned.purpose}: {port_conflict(planned) or error}; does another"
            " part with the same WORLD_RANK run here? Free the port or choose another START_PORT",
            check="N-08",
        ) from None


def gang_host(plan: Plan) -> str:
    """Returns the address on which part 0 listens for the gang: its address in the plan; loopback for a single part.

    Returns 0.0.0.0 if the address in the plan is a host name or a NAT address.
    """
    if not plan.is_multi_part:
        return "127.0.0.1"
    return plan.leader.ip if plan.leader.ip in local_addresses() else "0.0.0.0"


def leader_host(plan: Plan) -> str:
    """Returns the address under which this part connects to part 0.

    Part 0 itself uses a local address: behind NAT, the published one may not route back (alibaba/rtp-llm issue 82).
    """
    if plan.part != 0:
        return plan.leader.ip
    host = gang_host(plan)
    return "127.0.0.1" if host == "0.0.0.0" else host


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
