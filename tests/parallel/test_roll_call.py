"""The roll call over real sockets, without processes: strangers at the door, ranks that disagree, ranks that vanish."""

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
    "nothing": b"",
    "half a frame": pack_frame(FrameType.HELLO, b"{}")[:4],
    "no json": pack_frame(FrameType.HELLO, b"{"),
    "no object": pack_json(FrameType.HELLO, [1]),
    "a number": pack_json(FrameType.HEARTBEAT, 1),
    "no fingerprint": pack_json(FrameType.HELLO, {"rank": 1}),
    "no rank": pack_json(FrameType.HELLO, {"rank": None, "fingerprint": {}}),
    "out of turn": pack_frame(FrameType.STEP, b""),
}


def two_parts() -> Plan:
    port = free_start_port()
    members = {"x_part0": {"ip": "127.0.0.1", "port": port}, "x_part1": {"ip": "127.0.0.1", "port": port + 100}}
    settings = {"tp_size": 2, "local_world_size": 1, "start_port": port, "json_gang_parts": json.dumps(members)}
    return make_plan(Config.model_validate(settings), 0)


class Room:
    """A hub with its listening socket, and what it reported as lost."""

    def __init__(self, limits: Timeouts):
        self.plan = two_parts()
        self.listener = listen("127.0.0.1", 0)
        self.port = int(self.listener.getsockname()[1])
        self.lost: list[tuple[str, ExitCode]] = []
        self.failures: list[threading.ExceptHookArgs] = []
        self.coordinator = Coordinator(self.plan, 7, self.listener, limits, lambda *loss: self.lost.append(loss))
        self._thread = next(t for t in threading.enumerate() if t.name == "hub" and t.is_alive())

    def close(self) -> None:
        """The hub has no end of its own: its process has."""

        def leave(timeout: float) -> None:
            raise SystemExit

        self.coordinator._selector.select = leave  # type: ignore[method-assign, assignment]
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        self.coordinator._selector.close()
        for peer in self.coordinator._peers:
            peer.sock.close()
        self.listener.close()
        assert self.failures == []

    def failed(self, failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not SystemExit:
            self.failures.append(failure)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Room]]:
    """Opens hubs that do everything ten times as often, and sees to it that their threads have not failed."""
    monkeypatch.setattr("rtp_llm.parallel.coordinator.HEARTBEAT_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr("rtp_llm.parallel.coordinator.DISAGREE_GRACE_SECONDS", 0.15)
    with ExitStack() as stack:

        def open_room(come: float = 60, silence: float = 60, progress: float = 60) -> Room:
            room = stack.enter_context(closing(Room(Timeouts(come, silence, progress))))
            monkeypatch.setattr(threading, "excepthook", room.failed)
            return room

        yield open_room


@pytest.fixture
def dial() -> Iterator[Callable[[int], socket.socket]]:
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(connect("127.0.0.1", port, DEADLINE))


Dial = Callable[[int], socket.socket]
Open = Callable[..., Room]


def hello(rank: int, **fingerprint: Any) -> bytes:
    return pack_json(FrameType.HELLO, {"rank": rank, "fingerprint": FINGERPRINT | fingerprint})


def hear(sock: socket.socket, kind: FrameType) -> dict[str, Any]:
    """The next message of this kind."""
    while True:
        found, payload = recv_frame(sock)
        if found == kind:
            message: dict[str, Any] = json.loads(payload)
            return message


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL)


def joined(room: Room, dial: Dial) -> list[socket.socket]:
    """Both ranks, welcomed."""
    socks = [dial(room.port) for _ in range(2)]
    for rank, sock in enumerate(socks):
        sock.sendall(hello(rank))
    assert [hear(sock, FrameType.WELCOME)["epoch"] for sock in socks] == [7, 7]
    return socks


# The hub


def test_those_who_wait_are_told_who_is_missing(opened: Open, dial: Dial) -> None:
    room = opened()
    first = dial(room.port)
    first.sendall(hello(0))
    assert hear(first, FrameType.WAITING)["missing"] == room.plan.describe_part(1)


def test_all_here_and_agreed_is_an_epoch(opened: Open, dial: Dial) -> None:
    room = opened()
    first, second = joined(room, dial)
    second.sendall(pack_json(FrameType.HEARTBEAT, {"phase": "loading"}))
    until(lambda: "1" in hear(first, FrameType.GANG_STATUS)["ranks"])
    assert room.lost == []


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("formed", [False, True], ids=["forming", "formed"])
def test_a_stranger_changes_nothing(opened: Open, dial: Dial, noise: bytes, formed: bool) -> None:
    room = opened()
    socks = joined(room, dial) if formed else []
    with connect("127.0.0.1", room.port, DEADLINE) as stranger:
        stranger.sendall(noise)
        until(lambda: len(room.coordinator._peers) > len(socks) or noise)
    socks = socks or joined(room, dial)
    assert hear(socks[1], FrameType.GANG_STATUS)["epoch"] == 7
    assert room.lost == []


def test_parts_that_disagree_all_hear_the_same_difference(opened: Open, dial: Dial) -> None:
    room = opened()
    first, second = dial(room.port), dial(room.port)
    first.sendall(hello(0, model="a"))
    second.sendall(hello(1, model="b", extra=1))
    texts = [hear(sock, FrameType.REJECTED)["message"] for sock in (first, second)]
    assert texts[0] == texts[1]
    assert texts[0].splitlines()[1:] == ["  extra: part0=null  part1=1", '  model: part0="a"  part1="b"']


def test_a_rank_that_is_claimed_twice_is_a_disagreement(opened: Open, dial: Dial) -> None:
    room = opened()
    first, second = dial(room.port), dial(room.port)
    first.sendall(hello(0))
    second.sendall(hello(0))
    text = hear(second, FrameType.REJECTED)["message"]
    assert "rank 0 is claimed twice, by 127.0.0.1:" in text
    assert "check WORLD_RANK" in text


def test_who_never_comes_is_named_in_the_end(opened: Open, dial: Dial) -> None:
    room = opened(come=0.6)
    first = dial(room.port)
    first.sendall(hello(0))
    text = hear(first, FrameType.REJECTED)["message"]
    assert text == f"gave up after 0.01 minutes (GANG_TIMEOUT_MIN): missing {room.plan.describe_part(1)}"


def test_a_rank_that_left_before_the_roll_was_complete_may_come_again(opened: Open, dial: Dial) -> None:
    room = opened()
    with connect("127.0.0.1", room.port, DEADLINE) as early:
        early.sendall(hello(1))
        hear(early, FrameType.WAITING)
    until(lambda: not room.coordinator._peers)
    joined(room, dial)


def test_a_lost_connection_is_a_lost_rank(opened: Open, dial: Dial) -> None:
    room = opened()
    joined(room, dial)[1].close()
    until(lambda: room.lost)
    message, code = room.lost[0]
    assert message.startswith("lost rank 1 (127.0.0.1:")
    assert code == ExitCode.COMMUNICATION


def test_silence_is_a_hang(opened: Open, dial: Dial) -> None:
    room = opened(silence=0.5)
    joined(room, dial)
    until(lambda: room.lost)
    assert "no heartbeat from rank" in room.lost[0][0]
    assert room.lost[0][1] == ExitCode.HANG


@pytest.mark.parametrize(("idle", "lost"), [(11.0, True), (9.0, False)])
def test_a_heartbeat_without_progress_is_a_hang(opened: Open, dial: Dial, idle: float, lost: bool) -> None:
    room = opened(progress=10)
    socks = joined(room, dial)
    socks[1].sendall(pack_json(FrameType.HEARTBEAT, {"phase": "loading", "idle_s": idle}))
    until(lambda: "1" in hear(socks[0], FrameType.GANG_STATUS)["ranks"])
    hear(socks[0], FrameType.GANG_STATUS)  # a further beat, whose watch has seen the pulse
    assert [code for _, code in room.lost[:1]] == ([ExitCode.HANG] if lost else [])


# A rank's side


def member(tmp_path: Path, plan: Plan, rank: int, **settings: Any) -> GangClient:
    config = Config.model_validate({"gang_timeout_min": 0.01, **settings})
    return GangClient(plan, RankStatus(rank, plan.part_of(rank)), config, tmp_path, lambda *loss: None)


def as_part_1(plan: Plan, leader: int) -> Plan:
    """The second part's view, with part 0 at this roll call port."""
    members = [{"index": 0, "name": "x_part0", "ip": "127.0.0.1", "port": leader + 1}]
    members.append({"index": 1, "name": "x_part1", "ip": "127.0.0.1", "port": plan.start_port + 100})
    return Plan.from_json(
        {"members": members, "part": 1, "tp_size": 2, "world_size": 2, "local_world_size": 1}
        | {"start_port": plan.start_port + 100, "port_stride": 9, "device": "cpu"}
    )


def test_part_1_gives_up_where_part_0_never_comes(tmp_path: Path) -> None:
    plan = two_parts()
    with pytest.raises(GangError, match=r"gave up after 0\.01 minutes .* missing part0 .*Connection refused"):
        member(tmp_path, as_part_1(plan, plan.start_port - 1), 1).join(FINGERPRINT)
    board = json.loads((tmp_path / "gang.json").read_text())
    assert board["message"].startswith("waiting for part0 (127.0.0.1:")


def test_part_1_gives_up_where_something_else_answers(tmp_path: Path) -> None:
    """As where rank 0 is frozen, or another service has the port: the connection opens and no welcome comes."""
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        leave = threading.Event()

        def serve() -> None:
            listener.settimeout(POLL)
            while not leave.is_set():
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    continue
                with sock:
                    sock.sendall(b"220 mail.example ESMTP\r\n")

        serving = pool.submit(serve)
        try:
            with pytest.raises(GangError, match=r"gave up after 0\.01 minutes .*roll call interrupted: "):
                member(tmp_path, as_part_1(two_parts(), listener.getsockname()[1]), 1).join(FINGERPRINT)
        finally:
            leave.set()
            serving.result()


def test_a_refusal_is_handed_on_word_for_word(tmp_path: Path, opened: Open, dial: Dial) -> None:
    room = opened()
    first = dial(room.port)
    first.sendall(hello(0, model="b"))
    gang = member(tmp_path, as_part_1(room.plan, room.port), 1, gang_timeout_min=1)
    with pytest.raises(GangError) as caught:
        gang.join(FINGERPRINT)
    assert str(caught.value) == hear(first, FrameType.REJECTED)["message"]
    assert gang._sock is not None
    gang._sock.close()  # in the product the process ends here


@pytest.mark.parametrize(
    ("hang_up", "loss"),
    [
        (True, ("lost part 0: the peer closed the connection", ExitCode.COMMUNICATION)),
        (False, ("no word from rank 0 for 2 s", ExitCode.HANG)),
    ],
)
def test_a_leader_that_goes_or_falls_silent_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang_up: bool, loss: tuple[str, ExitCode]
) -> None:
    lost: list[tuple[str, ExitCode]] = []

    def leave(message: str, code: ExitCode) -> None:
        lost.append((message, code))
        raise SystemExit  # in the product the process ends here; here the thread

    monkeypatch.setattr(threading, "excepthook", lambda failure: None)
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        plan = as_part_1(two_parts(), listener.getsockname()[1])
        config = Config.model_validate({"heartbeat_timeout": 2})
        gang = GangClient(plan, RankStatus(1, 1), config, tmp_path, leave)
        joining = pool.submit(gang.join, FINGERPRINT)
        with listener.accept()[0] as leader:
            hear(leader, FrameType.HELLO)
            leader.sendall(pack_json(FrameType.WELCOME, {"epoch": 3, "part0_address": "127.0.0.1"}))
            joining.result()
            assert gang.epoch == 3
            if hang_up:
                leader.shutdown(socket.SHUT_RDWR)
            until(lambda: lost)
        assert lost[0] == loss
        assert gang._sock is not None
        gang._sock.close()
        until(lambda: not {"heartbeat", "gang"} & {thread.name for thread in threading.enumerate()})


# The step port


def join(rank: int, epoch: int) -> bytes:
    return pack_json(FrameType.JOIN, {"rank": rank, "epoch": epoch})


@pytest.mark.parametrize(
    "noise",
    [*NOISE.values(), pack_json(FrameType.JOIN, [1]), pack_json(FrameType.JOIN, {"epoch": 7}), join(1, 6)],
    ids=[*NOISE, "join without object", "join without rank", "another epoch"],
)
def test_a_stranger_on_the_step_port_is_dropped(dial: Dial, noise: bytes) -> None:
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        accepting = pool.submit(accept_ranks, listener, two_parts(), 7, 20)
        with connect("127.0.0.1", port, DEADLINE) as stranger:
            stranger.sendall(noise)
            with suppress(OSError):  # it may have been hung up on already
                stranger.shutdown(socket.SHUT_WR)
            with pytest.raises(OSError, match=r".+"):
                recv_frame(stranger)
        mine = dial(port)
        mine.sendall(join(1, 7))
        with accepting.result()[1] as theirs:
            theirs.sendall(pack_frame(FrameType.KEEPALIVE))
            assert recv_frame(mine) == (FrameType.KEEPALIVE, b"")


def test_a_silent_stranger_on_the_step_port_costs_a_moment_and_not_the_epoch(
    dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtp_llm.parallel.gang_client.CONNECT_TIMEOUT_SECONDS", 0.1)
    with closing(listen("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        dial(port)  # connects first, and says nothing
        dial(port).sendall(join(1, 7))
        found = pool.submit(accept_ranks, listener, two_parts(), 7, DEADLINE).result()
        found[1].close()
    assert set(found) == {1}


def test_a_rank_that_does_not_come_to_the_step_port_is_named() -> None:
    with (
        closing(listen("127.0.0.1", 0)) as listener,
        pytest.raises(CommunicationError, match=r"ranks \[1\] did not connect for steps within 0 s"),
    ):
        accept_ranks(listener, two_parts(), 7, 0.1)


def test_dialling_the_step_port_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> socket.socket:
        raise WireError("nobody there")

    with pytest.raises(CommunicationError, match="rank 0's step port: nobody there"):
        retry_connect(refused, 0.1)
