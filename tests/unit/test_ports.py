"""Ports of the plan that another process has."""

import os
import socket

import pytest

from rtp_llm.errors import ConfigError
from rtp_llm.machine.listen_addresses import listen_addresses, listen_on
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import listen_as_planned, port_conflict

NEEDS_IPV6 = pytest.mark.skipif("::" not in listen_addresses(""), reason="needs IPv6")


def test_a_port_in_use_is_named_with_its_owner() -> None:
    """The coordinator and the gang doctor listen so: two parts with one WORLD_RANK would end with a traceback."""
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with pytest.raises(ConfigError) as raised:
            listen_as_planned(PlannedPort(port, "doctor", "127.0.0.1"))
    text = str(raised.value)
    assert text.startswith(f"port {port}, wanted for the doctor: in use by pid {os.getpid()} (")
    assert "same WORLD_RANK" in text
    assert "choose another START_PORT" in text


def test_a_free_port_is_listened_on() -> None:
    with listen_as_planned(PlannedPort(0, "doctor", "127.0.0.1")) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize(
    ("owner", "host", "conflicts"),
    [
        ("127.0.0.1", "", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", False),
        ("127.0.0.1", "localhost", True),
        pytest.param("::1", "", True, marks=NEEDS_IPV6),
        pytest.param("::1", "0.0.0.0", False, marks=NEEDS_IPV6),
        pytest.param("::", "::", True, marks=NEEDS_IPV6),
    ],
)
def test_http_needs_the_addresses_of_host(owner: str, host: str, conflicts: bool) -> None:
    """A port of another address is free; one of [::] is not, though 0.0.0.0 could be listened on."""
    with listen_on(owner, 0) as listener:
        planned = PlannedPort(listener.getsockname()[1], "HTTP", host)
        found = port_conflict(planned)
    assert found.startswith(f"in use by pid {os.getpid()}") if conflicts else not found


def test_host_that_is_no_address_of_this_machine() -> None:
    for host in ("192.0.2.1", "my-machine"):
        with pytest.raises(ConfigError, match=f"HOST='{host}'"):
            port_conflict(PlannedPort(10000, "HTTP", host))
