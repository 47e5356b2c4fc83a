"""The port for steps of rank 0 over real sockets: strangers, ranks of another epoch, ranks that do not come."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel import gang_port, step_connections
from rtp_llm.parallel.gang_client import Assignment
from rtp_llm.parallel.handshake import Answer
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.rendezvous import KVCacheSize
from rtp_llm.parallel.step_connections import accept_ranks, connect_to_leader, join_leader
from rtp_llm.parallel.wire import FrameType, listen, pack_frame, pack_json, recv_frame
from tests.parallel.parts import DEADLINE
from tests.parallel.rendezvous import part_specs
from tests.parallel.test_rendezvous import NOISE

LEADER = Assignment(0, 7, "abc", "127.0.0.1", KVCacheSize())
FOLLOWER = replace(LEADER, rank=1)
JOIN = {"rank": 1, "epoch": 7, "incarnation": "abc", "nonce": "n", "secret": False, "mac": ""}
STRANGERS: dict[str, Any] = {
    "not an object": [1],
    "no rank": {"epoch": 7},
    "rank is no number": {**JOIN, "rank": [1]},
    "another epoch": {**JOIN, "epoch": 6},
    "another incarnation": {**JOIN, "incarnation": "def"},
    "rank 0": {**JOIN, "rank": 0},
    "negative rank": {**JOIN, "rank": -1},
    "rank out of range": {**JOIN, "rank": 2},
    "with a secret": {**JOIN, "secret": True, "mac": "0" * 64},
}
NESTED = pack_frame(FrameType.JOIN, b"[" * 60_000)


@pytest.fixture
def spec(tmp_path: Path) -> PartSpec:
    return part_specs(tmp_path, num_parts=1, dist_comm_timeout=DEADLINE)[0]


@pytest.fixture
def listener(spec: PartSpec) -> Iterator[socket.socket]:
    with closing(listen("127.0.0.1", spec.plan.leader_port(STEP_PORT_OFFSET))) as sock:
        yield sock


@pytest.fixture
def dial(spec: PartSpec, listener: socket.socket) -> Iterator[Callable[[], socket.socket]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(connect_to_leader(spec, lambda: None))


Dial = Callable[[], socket.socket]


def read_challenge(sock: socket.socket) -> None:
    frame_type, payload = recv_frame(sock)
    assert (frame_type, json.loads(payload)["secret"]) == (FrameType.CHALLENGE, False)


def is_closed(sock: socket.socket) -> bool:
    """Returns whether rank 0 closes the connection without an answer to what it was sent after the challenge."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def join_and_check(dial: Dial, spec: PartSpec, accepting: Any) -> None:
    """Joins as rank 1, and asserts that the connection is the one that rank 0 has accepted."""
    follower = dial()
    join_leader(follower, spec, FOLLOWER)
    sockets = accepting.result(DEADLINE)
    assert set(sockets) == {1}
    with sockets[1] as leader:
        leader.sendall(pack_frame(FrameType.KEEPALIVE))
        assert recv_frame(follower) == (FrameType.KEEPALIVE, b"")


@pytest.mark.parametrize(
    "noise",
    [*NOISE.values(), NESTED, *(pack_json(FrameType.JOIN, message) for message in STRANGERS.values())],
    ids=[*NOISE, "nested deeply", *(f"join, {name}" for name in STRANGERS)],
)
def test_stranger_is_dropped(dial: Dial, spec: PartSpec, listener: socket.socket, noise: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        stranger = dial()
        read_challenge(stranger)
        stranger.sendall(noise)
        with suppress(OSError):  # rank 0 may have closed the connection at once
            stranger.shutdown(socket.SHUT_WR)
        assert is_closed(stranger)
        join_and_check(dial, spec, accepting)


def test_rank_that_is_connected_cannot_be_taken(dial: Dial, tmp_path: Path) -> None:
    spec = part_specs(tmp_path, num_parts=1, dist_comm_timeout=DEADLINE)[0]
    spec = replace(spec, plan=replace(spec.plan, world_size=3, tp_size=3, local_world_size=3))
    with (
        closing(listen("127.0.0.1", spec.plan.leader_port(STEP_PORT_OFFSET))) as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        socks = [connect_to_leader(spec, lambda: None) for _ in range(3)]
        for sock, rank in zip(socks, (1, 1, 2), strict=True):
            join_leader(sock, spec, replace(LEADER, rank=rank))
        sockets = accepting.result(DEADLINE)
        assert {rank: sock.getpeername()[1] for rank, sock in sockets.items()} == {
            1: socks[0].getsockname()[1],
            2: socks[2].getsockname()[1],
        }
        for sock in [*socks, *sockets.values()]:
            sock.close()


def test_silent_connection_is_dropped_after_a_timeout(
    dial: Dial, spec: PartSpec, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = dial()  # connects first and sends nothing
    monkeypatch.setattr(gang_port, "STRANGER_SECONDS", 0.1)
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        read_challenge(silent)
        assert is_closed(silent)
        monkeypatch.undo()
        join_and_check(dial, spec, accepting)


def test_silent_and_slow_strangers_delay_no_rank(
    dial: Dial, spec: PartSpec, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come first and stay, within the time that each may take for its JOIN."""
    monkeypatch.setattr(gang_port, "STRANGER_SECONDS", DEADLINE)
    strangers = [dial() for _ in range(20)]
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        for stranger in strangers:
            read_challenge(stranger)
            stranger.sendall(pack_json(FrameType.JOIN, JOIN)[:9])
        join_and_check(dial, spec, accepting)
    assert all(is_closed(stranger) for stranger in strangers)


def test_a_crowd_of_strangers_displaces_the_oldest(
    dial: Dial, spec: PartSpec, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_port, "MAX_STRANGERS", 3)
    monkeypatch.setattr(gang_port, "STRANGER_SECONDS", DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        first, *_ = [dial() for _ in range(4)]
        read_challenge(first)
        assert is_closed(first)
        join_and_check(dial, spec, accepting)


@pytest.mark.parametrize(("leader", "follower", "accepted"), [("a", "a", True), ("a", "b", False), ("a", "", False)])
def test_rank_must_know_the_secret(
    dial: Dial,
    spec: PartSpec,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    leader: str,
    follower: str,
    accepted: bool,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(step_connections, "read_secret", lambda config: leader.encode())
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        first = dial()
        frame_type, payload = recv_frame(first)
        assert (frame_type, json.loads(payload)["secret"]) == (FrameType.CHALLENGE, True)
        answer = Answer(follower.encode(), json.loads(payload))
        first.sendall(pack_json(FrameType.JOIN, answer.sign({"rank": 1, "epoch": 7, "incarnation": "abc"})))
        if not accepted:
            assert first.recv(1) == b""
            join_leader(dial(), spec, FOLLOWER)
        sockets = accepting.result(DEADLINE)
        is_first = sockets[1].getpeername() == first.getsockname()
        sockets[1].close()
    assert is_first == accepted


def test_rank_that_does_not_connect_is_named(spec: PartSpec, listener: socket.socket) -> None:
    impatient = replace(spec, config=spec.config.model_copy(update={"dist_comm_timeout": 0.1}))
    with pytest.raises(
        CommunicationError, match=r"ranks \[1\] did not connect to rank 0 for scheduler steps within 0 s"
    ):
        accept_ranks(listener, impatient, LEADER)


def test_abort_ends_the_wait_for_ranks(spec: PartSpec, listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(accept_ranks, listener, spec, LEADER)
        listener.shutdown(socket.SHUT_RDWR)
        with pytest.raises(CommunicationError, match="port for steps from rank 0"):
            accepting.result(DEADLINE)


def test_connecting_times_out(spec: PartSpec) -> None:
    impatient = replace(spec, config=spec.config.model_copy(update={"dist_comm_timeout": 0.1}))
    port = spec.plan.leader_port(STEP_PORT_OFFSET)
    with pytest.raises(
        CommunicationError,
        match=rf"cannot connect to rank 0 at 127\.0\.0\.1:{port} \(scheduler steps\): .*Connection refused",
    ):
        connect_to_leader(impatient, lambda: None)


def test_abort_ends_the_attempts_to_connect(spec: PartSpec) -> None:
    def check_aborted() -> None:
        raise CommunicationError("aborted: a test")

    with pytest.raises(CommunicationError, match="aborted: a test"):
        connect_to_leader(spec, check_aborted)


def test_leader_that_closes_the_connection_is_an_error(dial: Dial, spec: PartSpec, listener: socket.socket) -> None:
    follower = dial()
    listener.accept()[0].close()
    with pytest.raises(CommunicationError, match="rank 0 did not accept this rank's connection for steps"):
        join_leader(follower, spec, FOLLOWER)
