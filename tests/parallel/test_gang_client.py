"""A worker's side of the rendezvous, over real sockets: epochs, a lost coordinator, parts that give up."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.errors import CommunicationError, ExitCode, GangError
from rtp_llm.parallel import coordinator, coordinator_connection, gang_client
from rtp_llm.parallel.coordinator_connection import CoordinatorConnection
from rtp_llm.parallel.gang_client import GangClient
from rtp_llm.parallel.handshake import SecretError
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.rendezvous import KVCacheSize
from rtp_llm.parallel.wire import FrameType, listen, pack_json
from tests.parallel.parts import DEADLINE, POLL
from tests.parallel.rendezvous import FINGERPRINT, CoordinatorThread, Peer, part_specs, until

Join = Callable[..., GangClient]
Exit = tuple[str, ExitCode]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[Exit]:
    """Records the exits of this process instead of exiting. The thread ends."""
    recorded: list[Exit] = []

    def exit_thread(message: str, code: ExitCode) -> None:
        recorded.append((message, code))
        raise SystemExit

    report = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda failure: failure.exc_type is SystemExit or report(failure))
    monkeypatch.setattr(gang_client, "exit_process", exit_thread)
    return recorded


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch, exits: list[Exit]) -> Iterator[Join]:
    """Starts workers. Their threads, which in the product run as long as the process, end with the test."""
    is_over = threading.Event()
    clients: list[GangClient] = []

    def connect(part_spec: PartSpec) -> CoordinatorConnection:
        if is_over.is_set():
            raise SystemExit
        return CoordinatorConnection(part_spec)

    def start(part_spec: PartSpec, index: int = 0) -> GangClient:
        client = GangClient(part_spec, index, RankStatus(part_spec.plan.part))
        client.start()
        clients.append(client)
        return client

    monkeypatch.setattr(gang_client, "CoordinatorConnection", connect)
    yield start
    is_over.set()
    for client in clients:
        connection, client._assignment = client._connection, None
        with client._changed:
            client._wants_rank = True
            client._changed.notify_all()
        if connection:
            with suppress(OSError):
                connection._sock.shutdown(socket.SHUT_RDWR)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "gang"])


@pytest.fixture
def specs(tmp_path: Path) -> list[PartSpec]:
    return part_specs(tmp_path, heartbeat_timeout=60)


@pytest.fixture
def thread(specs: list[PartSpec], monkeypatch: pytest.MonkeyPatch) -> Iterator[CoordinatorThread]:
    monkeypatch.setattr(coordinator, "HEARTBEAT_INTERVAL_SECONDS", POLL)
    monkeypatch.setattr(coordinator, "DISAGREE_GRACE_SECONDS", 0.15)
    with closing(CoordinatorThread(specs[0])) as running:
        yield running


@pytest.fixture
def other(thread: CoordinatorThread) -> Iterator[Peer]:
    """A worker of part 1 that waits for a rank."""
    with closing(Peer(thread.port)) as peer:
        yield peer.join(part=1)


def test_rank_reports_its_phase_at_once(
    join: Join, specs: list[PartSpec], other: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_connection, "HEARTBEAT_INTERVAL_SECONDS", 3600)
    client = join(specs[0])
    next(client.epochs())
    for phase in ("loading", "warmup", "serving"):
        client.rank_status.set_phase(phase)  # type: ignore[arg-type]
        other.receive_until(
            FrameType.GANG_STATUS,
            lambda status: status["ranks"].get("0", {}).get("phase") == phase,  # noqa: B023
        )


def test_worker_keeps_rank_and_memory_in_the_next_epoch(
    join: Join, specs: list[PartSpec], thread: CoordinatorThread, other: Peer
) -> None:
    client, reasons = join(specs[0]), list[str]()
    epochs = client.epochs()
    first = next(epochs)
    assert (first.rank, first.epoch, first.incarnation) == (0, 1, thread.coordinator.incarnation)
    assert (first.address, first.kv_cache) == ("127.0.0.1", KVCacheSize())
    client.abort_epoch = reasons.append
    client.resident_rank, client.kv_cache = 0, KVCacheSize(77, 500)
    other.close()
    until(lambda: reasons)
    assert reasons[0].startswith("lost rank 1 (127.0.0.1:")
    with closing(Peer(thread.port)) as again:
        again.join(part=1)
        second = next(epochs)
        assert (second.rank, second.epoch, second.kv_cache) == (0, 2, KVCacheSize(77, 500))
        assert again.receive(FrameType.WELCOME)["num_blocks"] == 77
        assert len(reasons) == 1


def test_epoch_that_ends_before_the_rank_is_in_it(join: Join, specs: list[PartSpec], other: Peer) -> None:
    """Importing torch takes seconds. Nobody can abort what has not begun, so the rank must look before it waits."""
    client = join(specs[0])
    client.wait_for_work()
    other.close()
    until(lambda: client._is_leaving)
    with pytest.raises(CommunicationError, match="the epoch has ended"):
        client.check_epoch()
    with pytest.raises(CommunicationError, match="the epoch has ended"):
        client.wait_until_loaded()


def test_ranks_wait_until_all_have_loaded(join: Join, specs: list[PartSpec], other: Peer) -> None:
    client = join(specs[0])
    next(client.epochs())
    with ThreadPoolExecutor(1) as pool:
        client.rank_status.set_phase("warmup")
        waiting = pool.submit(client.wait_until_loaded)
        other.beat("loading", part=1)
        other.receive_until(FrameType.GANG_STATUS, lambda status: len(status["ranks"]) == 2)
        assert not waiting.done()
        other.beat("warmup", part=1)
        waiting.result(DEADLINE)


def test_spare_waits_until_the_gang_serves(join: Join, specs: list[PartSpec], other: Peer) -> None:
    """Then it imports torch, which would slow the start of the ranks down."""
    client = join(specs[0])
    next(client.epochs())
    spare = join(specs[0], index=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(spare.wait_for_work)
        client.rank_status.set_phase("serving")
        other.receive_until(FrameType.GANG_STATUS, lambda status: "0" in status["ranks"])
        assert not waiting.done()
        other.beat("serving", part=1)
        waiting.result(DEADLINE)


def test_import_of_torch_is_announced(join: Join, specs: list[PartSpec], other: Peer) -> None:
    client = join(specs[0])
    client.wait_for_work()
    for expected in (True, False):
        with client.importing() if expected else nullcontext():
            other.receive_until(
                FrameType.GANG_STATUS,
                lambda status: status["ranks"].get("0", {}).get("is_importing") == expected,  # noqa: B023
            )


def test_failure_of_a_rank_is_reported(join: Join, specs: list[PartSpec], other: Peer) -> None:
    client = join(specs[0])
    next(client.epochs())
    client.fail_epoch("network unreachable")
    ended = other.receive(FrameType.EPOCH_ENDED)
    assert (ended["reason"], ended["restart"]) == ("rank 0: network unreachable", True)


def test_ranks_restart_where_a_new_epoch_does_not_help(
    join: Join, specs: list[PartSpec], other: Peer, exits: list[Exit]
) -> None:
    next(join(specs[0]).epochs())
    other.send(FrameType.EPOCH_ENDED, {"epoch": 1, "reason": "x"})  # before the gang has served
    until(lambda: exits)
    assert exits == [("rank 1: x; forming the gang again does not help", ExitCode.COMMUNICATION)]


def test_recovery_by_restart(join: Join, tmp_path: Path, exits: list[Exit], monkeypatch: pytest.MonkeyPatch) -> None:
    specs = part_specs(tmp_path, rtp_recovery="restart")
    with closing(CoordinatorThread(specs[0])) as thread, closing(Peer(thread.port)) as other:
        other.join(part=1)
        next(join(specs[0]).epochs())
        other.close()
        until(lambda: exits)
    assert exits[0][0].startswith("lost rank 1 (127.0.0.1:")
    assert exits[0][1] == ExitCode.COMMUNICATION


# Part 0 does not answer, or rejects


def test_part_1_gives_up_if_part_0_does_not_listen(join: Join, tmp_path: Path) -> None:
    spec = part_specs(tmp_path, gang_timeout_min=0.01)[1]
    with pytest.raises(GangError) as caught:
        join(spec).wait_for_work()
    assert str(caught.value) == f"gave up after 0.01 minutes (GANG_TIMEOUT_MIN): missing {spec.plan.describe_part(0)}"


@pytest.mark.parametrize("answer", [b"220 mail.example ESMTP\r\n", b"", pack_json(FrameType.WELCOME, {})])
def test_part_1_gives_up_if_another_program_answers(
    join: Join, tmp_path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_connection, "CONNECT_TIMEOUT_SECONDS", 0.1)
    spec = part_specs(tmp_path, gang_timeout_min=0.01)[1]
    port = spec.plan.leader_port(RENDEZVOUS_PORT_OFFSET)
    stop = threading.Event()
    with ExitStack() as stack, closing(listen("127.0.0.1", port)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(POLL)

        def serve() -> None:
            while not stop.is_set():
                with suppress(TimeoutError):
                    sock = stack.enter_context(listener.accept()[0])
                    sock.sendall(answer)

        serving = pool.submit(serve)
        try:
            with pytest.raises(GangError, match=r"gave up after 0\.01 minutes .*: missing part0"):
                join(spec).wait_for_work()
        finally:
            stop.set()
            serving.result()


def test_rejection_message_is_raised_unchanged(join: Join, specs: list[PartSpec], thread: CoordinatorThread) -> None:
    with closing(Peer(thread.port)) as first:
        first.join(fingerprint=FINGERPRINT | {"model": "b"})
        with pytest.raises(GangError) as caught:
            join(specs[1]).wait_for_work()
        assert str(caught.value) == first.receive(FrameType.REJECTED)["message"]
        assert "model" in str(caught.value)


@pytest.mark.parametrize(
    ("hang_up", "reason"),
    [
        (True, "lost the coordinator on part 0: the peer closed the connection"),
        (False, "lost the coordinator on part 0: the coordinator sent no message for 2 s (HEARTBEAT_TIMEOUT)"),
    ],
)
def test_coordinator_that_disconnects_or_is_silent_is_lost(
    join: Join, tmp_path: Path, hang_up: bool, reason: str
) -> None:
    spec, reasons = part_specs(tmp_path, heartbeat_timeout=2)[1], list[str]()
    welcome: dict[str, Any] = {"rank": 1, "epoch": 3, "incarnation": "x", "part0_address": "127.0.0.1"}
    with closing(listen("127.0.0.1", spec.plan.leader_port(RENDEZVOUS_PORT_OFFSET))) as listener:
        client = join(spec)
        with listener.accept()[0] as sock:
            sock.sendall(pack_json(FrameType.CHALLENGE, {"nonce": "n", "secret": False}))
            sock.sendall(pack_json(FrameType.ACCEPTED, {"proof": ""}))
            sock.sendall(pack_json(FrameType.WELCOME, welcome | {"num_blocks": 0, "max_seq_len": 0}))
            assert next(client.epochs()).epoch == 3
            client.abort_epoch = reasons.append
            if hang_up:
                sock.shutdown(socket.SHUT_RDWR)
            until(lambda: reasons)
    assert reasons == [reason]


# The secret


def connect_with(spec: PartSpec, secret: str, monkeypatch: pytest.MonkeyPatch) -> CoordinatorConnection:
    monkeypatch.setenv("GANG_SECRET", secret)
    return CoordinatorConnection(spec)


@pytest.mark.parametrize(
    ("part_0", "part_1", "message"),
    [
        ("a", "b", "GANG_SECRET is not the same; set the same on all parts"),
        ("a", "", "GANG_SECRET is not set on this part and set on the other; set the same on all parts"),
        ("", "b", "GANG_SECRET is set on this part and not set on the other; set the same on all parts"),
    ],
)
def test_different_secrets_are_named(
    specs: list[PartSpec], part_0: str, part_1: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        closing(CoordinatorThread(specs[0], part_0.encode())),
        closing(connect_with(specs[1], part_1, monkeypatch)) as connection,
    ):
        connection.say_hello("guard")
        with pytest.raises(SecretError) as caught:
            connection.receive()
    assert message in str(caught.value)


def test_coordinator_must_prove_that_it_knows_the_secret(
    specs: list[PartSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = specs[1].plan.leader_port(RENDEZVOUS_PORT_OFFSET)
    with closing(listen("127.0.0.1", port)) as listener, ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect_with, specs[1], "a", monkeypatch)
        with listener.accept()[0] as impostor:
            impostor.sendall(pack_json(FrameType.CHALLENGE, {"nonce": "n", "secret": True}))
            with closing(connecting.result(DEADLINE)) as connection:
                connection.say_hello("guard")
                impostor.sendall(pack_json(FrameType.ACCEPTED, {"proof": "0" * 64}))
                with pytest.raises(SecretError):
                    connection.receive()


def test_equal_secrets_are_accepted(specs: list[PartSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        closing(CoordinatorThread(specs[0], b"a")),
        closing(connect_with(specs[1], "a", monkeypatch)) as connection,
    ):
        connection.say_hello("guard")
        assert connection.receive()[0] == FrameType.GANG_STATUS
