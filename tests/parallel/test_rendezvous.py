"""The rendezvous over real sockets, in one process: foreign connections, ranks that disagree, lost ranks."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.config import Config
from rtp_llm.errors import CommunicationError, ExitCode, GangError
from rtp_llm.parallel.coordinator import Coordinator, Timeouts
from rtp_llm.parallel.gang_client import GangClient, accept_ranks, retry_connect
from rtp_llm.parallel.plan import Plan, make_plan
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.wire import FrameType, WireError, connect, listen, pack_frame, pack_json, recv_frame
from tests.parallel.parts import DEADLINE, POLL
from tests.ports import free_start_port

FINGERPRINT = {"model": "a", "config.MAX_SEQ_LEN": 0}
NOISE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "no data": b"",
    "half a frame": pack_frame(FrameType.HELLO, b"{}")[:4],
    "invalid json": pack_frame(FrameType.HELLO, b"{"),
    "not an object": pack_json(FrameType.HELLO, [1]),
    "number": pack_json(FrameType.HEARTBEAT, 1),
    "no fingerprint": pack_json(FrameType.HELLO, {"rank": 1}),
    "no rank": pack_json(FrameType.HELLO, {"rank": None, "fingerprint": {}}),
    "unexpected frame": pack_frame(FrameType.STEP, b""),
}


def two_parts() -> Plan:
    port = free_start_port()
    members = {"x_part0": {"ip": "127.0.0.1", "port": port}, "x_part1": {"ip": "127.0.0.1", "port": port + 100}}
    settings = {"tp_size": 2, "local_world_size": 1, "start_port": port, "json_gang_parts": json.dumps(members)}
    return make_plan(Config.model_validate(settings), 0)


class CoordinatorProbe:
    """A coordinator (rank 0's side of the rendezvous), its listening socket and the lost ranks that it reported."""

    def __init__(self, timeouts: Timeouts):
        self.plan = two_parts()
        self.listener = listen("127.0.0.1", 0)
        self.port = int(self.listener.getsockname()[1])
        self.lost: list[tuple[str, ExitCode]] = []
        self.failures: list[threading.ExceptHookArgs] = []
        self.coordinator = Coordinator(self.plan, 7, self.listener, timeouts, lambda *loss: self.lost.append(loss))
        self._thread = next(t for t in threading.enumerate() if t.name == "coordinator" and t.is_alive())

    def close(self) -> None:
        """Ends the coordinator's thread, which has no stop method: in the product it ends with its process."""

        def exit_thread(timeout: float) -> None:
            raise SystemExit

        self.coordinator._selector.select = exit_thread  # type: ignore[method-assign, assignment]
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        self.coordinator._selector.close()
        for peer in self.coordinator._peers:
            peer.sock.close()
        self.listener.close()
        assert self.failures == []

    def on_thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not SystemExit:
            self.failures.append(failure)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CoordinatorProbe]]:
    """Starts coordinators with a tenth of the usual intervals. Asserts at the end that no thread failed."""
    monkeypatch.setattr("rtp_llm.parallel.coordinator.HEARTBEAT_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr("rtp_llm.parallel.coordinator.DISAGREE_GRACE_SECONDS", 0.15)
    with ExitStack() as stack:

        def start_coordinator(join: float = 60, heartbeat: float = 60, progress: float = 60) -> CoordinatorProbe:
            probe = stack.enter_context(closing(CoordinatorProbe(Timeouts(join, heartbeat, progress))))
            monkeypatch.setattr(threading, "excepthook", probe.on_thread_failed)
            return probe

        yield start_coordinator


@pytest.fixture
def dial() -> Iterator[Callable[[int], socket.socket]]:
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(connect("127.0.0.1", port, DEADLINE))


Dial = Callable[[int], socket.socket]
Start = Callable[..., CoordinatorProbe]


def hello(rank: int, **fingerprint: Any) -> bytes:
    return pack_json(FrameType.HELLO, {"rank": rank, "fingerprint": FINGERPRINT | fingerprint})


def receive(sock: socket.socket, frame_type: FrameType) -> dict[str, Any]:
    """Returns the next message of this type."""
    while True:
        received_type, payload = recv_frame(sock)
        if received_type == frame_type:
            message: dict[str, Any] = json.loads(payload)
            return message


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL)


def join_both(probe: CoordinatorProbe, dial: Dial) -> list[socket.socket]:
    """Joins ranks 0 and 1 and waits for WELCOME, the coordinator's reply. Returns their sockets by rank."""
    socks = [dial(probe.port) for _ in range(2)]
    for rank, sock in enumerate(socks):
        sock.sendall(hello(rank))
    assert [receive(sock, FrameType.WELCOME)["epoch"] for sock in socks] == [7, 7]
    return socks


# The coordinator


def test_waiting_rank_receives_the_missing_parts(start: Start, dial: Dial) -> None:
    probe = start()
    first = dial(probe.port)
    first.sendall(hello(0))
    assert receive(first, FrameType.WAITING)["missing"] == probe.plan.describe_part(1)


def test_epoch_starts_when_all_ranks_have_joined_and_agree(start: Start, dial: Dial) -> None:
    probe = start()
    first, second = join_both(probe, dial)
    second.sendall(pack_json(FrameType.HEARTBEAT, {"phase": "loading"}))
    until(lambda: "1" in receive(first, FrameType.GANG_STATUS)["ranks"])
    assert probe.lost == []


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("formed", [False, True], ids=["forming", "formed"])
def test_foreign_connection_does_not_disturb_the_gang(start: Start, dial: Dial, noise: bytes, formed: bool) -> None:
    probe = start()
    socks = join_both(probe, dial) if formed else []
    with connect("127.0.0.1", probe.port, DEADLINE) as foreign:
        foreign.sendall(noise)
        until(lambda: len(probe.coordinator._peers) > len(socks) or noise)
    socks = socks or join_both(probe, dial)
    assert receive(socks[1], FrameType.GANG_STATUS)["epoch"] == 7
    assert probe.lost == []


def test_all_parts_that_disagree_receive_the_same_difference(start: Start, dial: Dial) -> None:
    probe = start()
    first, second = dial(probe.port), dial(probe.port)
    first.sendall(hello(0, model="a"))
    second.sendall(hello(1, model="b", extra=1))
    texts = [receive(sock, FrameType.REJECTED)["message"] for sock in (first, second)]
    assert texts[0] == texts[1]
    assert texts[0].splitlines()[1:] == ["  extra: part0=null  part1=1", '  model: part0="a"  part1="b"']


def test_a_rank_that_is_claimed_twice_is_a_disagreement(start: Start, dial: Dial) -> None:
    probe = start()
    first, second = dial(probe.port), dial(probe.port)
    first.sendall(hello(0))
    second.sendall(hello(0))
    text = receive(second, FrameType.REJECTED)["message"]
    assert "rank 0 is claimed twice, by 127.0.0.1:" in text
    assert "check WORLD_RANK" in text


def test_rejection_after_the_timeout_names_missing_parts(start: Start, dial: Dial) -> None:
    probe = start(join=0.6)
    first = dial(probe.port)
    first.sendall(hello(0))
    text = receive(first, FrameType.REJECTED)["message"]
    assert text == f"gave up after 0.01 minutes (GANG_TIMEOUT_MIN): missing {probe.plan.describe_part(1)}"


def test_rank_that_left_before_the_gang_formed_may_join_again(start: Start, dial: Dial) -> None:
    probe = start()
    with connect("127.0.0.1", probe.port, DEADLINE) as early:
        early.sendall(hello(1))
        receive(early, FrameType.WAITING)
    until(lambda: not probe.coordinator._peers)
    join_both(probe, dial)


def test_a_lost_connection_is_a_lost_rank(start: Start, dial: Dial) -> None:
    probe = start()
    join_both(probe, dial)[1].close()
    until(lambda: probe.lost)
    message, code = probe.lost[0]
    assert message.startswith("lost rank 1 (127.0.0.1:")
    assert code == ExitCode.COMMUNICATION


def test_missing_heartbeat_is_a_hang(start: Start, dial: Dial) -> None:
    probe = start(heartbeat=0.5)
    join_both(probe, dial)
    until(lambda: probe.lost)
    assert "no heartbeat from rank" in probe.lost[0][0]
    assert probe.lost[0][1] == ExitCode.HANG


@pytest.mark.parametrize(("idle", "lost"), [(11.0, True), (9.0, False)])
def test_a_heartbeat_without_progress_is_a_hang(start: Start, dial: Dial, idle: float, lost: bool) -> None:
    probe = start(progress=10)
    socks = join_both(probe, dial)
    socks[1].sendall(pack_json(FrameType.HEARTBEAT, {"phase": "loading", "idle_s": idle}))
    until(lambda: "1" in receive(socks[0], FrameType.GANG_STATUS)["ranks"])
    receive(socks[0], FrameType.GANG_STATUS)  # sent after a liveness check of this rank status
    assert [code for _, code in probe.lost[:1]] == ([ExitCode.HANG] if lost else [])


def test_a_change_of_phase_is_told_at_once(monkeypatch: pytest.MonkeyPatch, start: Start, dial: Dial) -> None:
    """Ranks wait until all have loaded: without the extra status they would learn it an hour later."""
    interval = "rtp_llm.parallel.coordinator.HEARTBEAT_INTERVAL_SECONDS"
    monkeypatch.setattr(interval, 3600)
    socks = join_both(start(), dial)
    for phase in ("loading", "warmup", "serving"):
        if phase == "serving":
            monkeypatch.setattr(interval, 0.05)  # from the next status on, so that the coordinator's thread can end
        socks[1].sendall(pack_json(FrameType.HEARTBEAT, {"phase": phase}))
        until(lambda: receive(socks[0], FrameType.GANG_STATUS)["ranks"].get("1", {}).get("phase") == phase)  # noqa: B023


# A rank's side


def member(tmp_path: Path, plan: Plan, rank: int, **settings: Any) -> GangClient:
    config = Config.model_validate({"gang_timeout_min": 0.01, **settings})
    return GangClient(plan, RankStatus(rank, plan.part_of(rank)), config, tmp_path, lambda *loss: None)


def test_a_rank_reports_its_phase_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rtp_llm.parallel.gang_client.HEARTBEAT_INTERVAL_SECONDS", 3600)
    client = member(tmp_path, two_parts(), 0)
    client._sock, coordinator = socket.socketpair()
    with client._sock, coordinator:
        coordinator.settimeout(DEADLINE)
        threading.Thread(target=client._send_heartbeats, daemon=True).start()
        for phase in ("loading", "warmup", "serving"):
            assert receive(coordinator, FrameType.HEARTBEAT)["phase"] != phase
            client.rank_status.set_phase(phase)  # type: ignore[arg-type]
        assert receive(coordinator, FrameType.HEARTBEAT)["phase"] == "serving"


def as_part_1(plan: Plan, rendezvous_port: int) -> Plan:
    """Returns the plan as part 1 has it, with part 0 at this rendezvous port."""
    members = [{"index": 0, "name": "x_part0", "ip": "127.0.0.1", "port": rendezvous_port + 1}]
    members.append({"index": 1, "name": "x_part1", "ip": "127.0.0.1", "port": plan.start_port + 100})
    return Plan.from_json(
        {"members": members, "part": 1, "tp_size": 2, "world_size": 2, "local_world_size": 1}
        | {"start_port": plan.start_port + 100, "port_stride": 9, "device": "cpu"}
    )


def test_part_1_gives_up_if_part_0_does_not_listen(tmp_path: Path) -> None:
    plan = two_parts()
    with pytest.raises(GangError, match=r"gave up after 0\.01 minutes .* missing part0 .*Connection refused"):
        member(tmp_path, as_part_1(plan, plan.start_port - 1), 1).join(FINGERPRINT)
    gang_status = json.loads((tmp_path / "gang.json").read_text())
    assert gang_status["message"].startswith("waiting for part0 (127.0.0.1:")


def test_part_1_gives_up_if_another_program_answers(tmp_path: Path) -> None:
    """Part 1 exits if its connection opens but no WELCOME (reply of rank 0) arrives: another program answers, or rank 0
    is frozen."""
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        stop = threading.Event()

        def serve() -> None:
            listener.settimeout(POLL)
            while not stop.is_set():
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    continue
                with sock:
                    sock.sendall(b"220 mail.example ESMTP\r\n")

        serving = pool.submit(serve)
        try:
            with pytest.raises(GangError, match=r"gave up after 0\.01 minutes .*rendezvous interrupted: "):
                member(tmp_path, as_part_1(two_parts(), listener.getsockname()[1]), 1).join(FINGERPRINT)
        finally:
            stop.set()
            serving.result()


def test_rejection_message_is_raised_unchanged(tmp_path: Path, start: Start, dial: Dial) -> None:
    probe = start()
    first = dial(probe.port)
    first.sendall(hello(0, model="b"))
    gang = member(tmp_path, as_part_1(probe.plan, probe.port), 1, gang_timeout_min=1)
    with pytest.raises(GangError) as caught:
        gang.join(FINGERPRINT)
    assert str(caught.value) == receive(first, FrameType.REJECTED)["message"]
    assert gang._sock is not None
    gang._sock.close()  # in the product the process ends here


@pytest.mark.parametrize(
    ("hang_up", "loss"),
    [
        (True, ("lost part 0: the peer closed the connection", ExitCode.COMMUNICATION)),
        (False, ("no message from rank 0 for 2 s", ExitCode.HANG)),
    ],
)
def test_leader_that_disconnects_or_is_silent_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang_up: bool, loss: tuple[str, ExitCode]
) -> None:
    lost: list[tuple[str, ExitCode]] = []

    def on_lost(message: str, code: ExitCode) -> None:
        lost.append((message, code))
        raise SystemExit  # ends the thread; in the product the process ends here

    monkeypatch.setattr(threading, "excepthook", lambda failure: None)
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        plan = as_part_1(two_parts(), listener.getsockname()[1])
        config = Config.model_validate({"heartbeat_timeout": 2})
        gang = GangClient(plan, RankStatus(1, 1), config, tmp_path, on_lost)
        joining = pool.submit(gang.join, FINGERPRINT)
        with listener.accept()[0] as leader:
            receive(leader, FrameType.HELLO)
            leader.sendall(pack_json(FrameType.WELCOME, {"epoch": 3, "part0_address": "127.0.0.1"}))
            joining.result()
            assert gang.epoch == 3
            if hang_up:
                leader.shutdown(socket.SHUT_RDWR)
            until(lambda: lost)
        assert lost[0] == loss
        assert gang._sock is not None
        gang._sock.close()
        until(lambda: not {"heartbeat", "gang-status"} & {thread.name for thread in threading.enumerate()})


# The step port


def join(rank: int, epoch: int) -> bytes:
    return pack_json(FrameType.JOIN, {"rank": rank, "epoch": epoch})


@pytest.mark.parametrize(
    "noise",
    [*NOISE.values(), pack_json(FrameType.JOIN, [1]), pack_json(FrameType.JOIN, {"epoch": 7}), join(1, 6)],
    ids=[*NOISE, "join without object", "join without rank", "another epoch"],
)
def test_foreign_connection_to_the_step_port_is_dropped(dial: Dial, noise: bytes) -> None:
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        accepting = pool.submit(accept_ranks, listener, two_parts(), 7, 20)
        with connect("127.0.0.1", port, DEADLINE) as foreign:
            foreign.sendall(noise)
            with suppress(OSError):  # rank 0 may have closed the connection already
                foreign.shutdown(socket.SHUT_WR)
            with pytest.raises(OSError, match=r".+"):
                recv_frame(foreign)
        follower = dial(port)
        follower.sendall(join(1, 7))
        with accepting.result()[1] as leader:
            leader.sendall(pack_frame(FrameType.KEEPALIVE))
            assert recv_frame(follower) == (FrameType.KEEPALIVE, b"")


def test_silent_connection_to_the_step_port_is_dropped_after_a_timeout(
    dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtp_llm.parallel.gang_client.CONNECT_TIMEOUT_SECONDS", 0.1)
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        dial(port)  # connects first and sends nothing
        dial(port).sendall(join(1, 7))
        sockets = pool.submit(accept_ranks, listener, two_parts(), 7, DEADLINE).result()
        sockets[1].close()
    assert set(sockets) == {1}


def test_rank_that_does_not_connect_to_the_step_port_is_named() -> None:
    with (
        closing(listen("127.0.0.1", 0)) as listener,
        pytest.raises(
            CommunicationError, match=r"ranks \[1\] did not connect to rank 0 for scheduler steps within 0 s"
        ),
    ):
        accept_ranks(listener, two_parts(), 7, 0.1)


def test_connecting_to_the_step_port_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> socket.socket:
        raise WireError("connection refused")

    with pytest.raises(
        CommunicationError,
        match=r"cannot connect to rank 0 at 10\.0\.0\.1:9998 \(scheduler steps\): connection refused",
    ):
        retry_connect(refuse, "10.0.0.1:9998", 0.1)
