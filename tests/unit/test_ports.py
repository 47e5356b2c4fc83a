"""Ports of the plan that another process has."""

import os
import socket

import pytest

from rtp_llm.errors import ConfigError
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import listen_as_planned


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
