"""The coordinator over real sockets: strangers, parts that disagree, epochs, lost and hanging ranks."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.machine.process import stopping_file
from rtp_llm.parallel import coordinator, gang_port
from rtp_llm.parallel.wire import FrameType, pack_frame, pack_json
from tests.parallel.rendezvous import FINGERPRINT, CoordinatorThread, Peer, part_specs, until

NOISE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "no data": b"",
    "half a frame": pack_frame(FrameType.HELLO, b"{}")[:4],
    "invalid json": pack_frame(FrameType.HELLO, b"{"),
    "not an object": pack_json(FrameType.HELLO, [1]),
    "number": pack_json(FrameType.HEARTBEAT, 1),
    "heartbeat": pack_json(FrameType.HEARTBEAT, {"phase": "serving"}),
    "failure": pack_json(FrameType.EPOCH_ENDED, {"epoch": 1, "reason": "x"}),
    "no fingerprint": pack_json(FrameType.HELLO, {"kind": "worker", "part": 1}),
    "no rank": pack_json(FrameType.HELLO, {"part": None, "fingerprint": {}}),
    "unexpected frame": pack_frame(FrameType.STEP, b""),
    "too long": pack_frame(FrameType.HELLO)[1:4] + b"\x7f" + bytes([FrameType.HELLO]),
}
MADE_UP: list[dict[str, Any]] = [
    {"fingerprint": {}},
    {"fingerprint": dict.fromkeys(FINGERPRINT, "x")},
    {"part": 2},
    {"part": -1},
]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., CoordinatorThread]]:
    """Starts coordinators of two parts, or of one, with a tenth of the usual intervals."""
    for name in ("HEARTBEAT_INTERVAL", "DISAGREE_GRACE", "TWIN", "FAILURE_SETTLE"):
        monkeypatch.setattr(coordinator, f"{name}_SECONDS", getattr(coordinator, f"{name}_SECONDS") / 10)
    with ExitStack() as stack:

        def start_coordinator(num_parts: int = 2, secret: bytes = b"", **settings: Any) -> CoordinatorThread:
            part_spec = part_specs(tmp_path, num_parts, **{"heartbeat_timeout": 60, **settings})[0]
            return stack.enter_context(closing(CoordinatorThread(part_spec, secret)))

        yield start_coordinator


@pytest.fixture
def dial() -> Iterator[Callable[[CoordinatorThread], Peer]]:
    with ExitStack() as stack:
        yield lambda thread: stack.enter_context(closing(Peer(thread.port)))


Dial = Callable[[CoordinatorThread], Peer]
Start = Callable[..., CoordinatorThread]


def form(thread: CoordinatorThread, dial: Dial, epoch: int = 1) -> list[Peer]:
    """Joins one worker of each part and waits until they are ranks 0 and 1. Returns them in this order."""
    peers = [dial(thread).join(part=part) for part in range(2)]
    welcomes = [peer.receive(FrameType.WELCOME) for peer in peers]
    assert [(w["rank"], w["epoch"]) for w in welcomes] == [(0, epoch), (1, epoch)]
    assert {w["incarnation"] for w in welcomes} == {thread.coordinator.incarnation}
    return peers


# The rendezvous


def test_waiting_worker_and_guard_receive_the_missing_parts(start: Start, dial: Dial) -> None:
    thread = start()
    expected = f"waiting for {thread.coordinator.part_spec.plan.describe_part(1)}"
    for peer in (dial(thread).join(), dial(thread).join(kind="guard")):
        status = peer.receive_until(FrameType.GANG_STATUS, lambda status: status["message"] == expected)
        assert (status["epoch"], status["in_epoch"], status["ranks"]) == (0, False, {})


def test_epoch_begins_when_there_is_a_worker_for_every_rank(start: Start, dial: Dial) -> None:
    first, second = form(start(), dial)
    second.beat("loading", part=1)
    status = first.receive_until(FrameType.GANG_STATUS, lambda status: "1" in status["ranks"])
    assert (status["epoch"], status["in_epoch"], status["message"]) == (1, True, "")
    assert status["ranks"]["1"]["phase"] == "loading"


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("formed", [False, True], ids=["forming", "formed"])
def test_stranger_gets_no_answer_and_does_not_disturb(start: Start, dial: Dial, noise: bytes, formed: bool) -> None:
    thread = start()
    peers = form(thread, dial) if formed else []
    stranger = dial(thread)
    stranger.sock.sendall(noise)
    if noise and noise != NOISE["half a frame"]:
        until(lambda: len(thread.coordinator._peers) == len(peers))
        assert stranger.rest() == []
    peers = peers or form(thread, dial)
    assert peers[1].receive(FrameType.GANG_STATUS)["in_epoch"]


@pytest.mark.parametrize("message", MADE_UP, ids=str)
def test_part_0_keeps_waiting_beside_a_made_up_member(
    start: Start, dial: Dial, message: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is told neither the members nor the checkpoint, and the parts of the gang are not rejected."""
    thread = start()
    first, stranger = dial(thread).join(), dial(thread)
    stranger.hello(**{"part": 1, **message})
    assert stranger.rest() == []
    until(lambda: "not a part of this gang" in caplog.text)
    second = dial(thread).join(part=1)
    assert [peer.receive(FrameType.WELCOME)["rank"] for peer in (first, second)] == [0, 1]


def test_silent_connection_is_closed(start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_port, "STRANGER_SECONDS", 0.2)
    thread = start()
    assert dial(thread).rest() == []
    form(thread, dial)


def test_all_parts_that_disagree_receive_the_same_difference(start: Start, dial: Dial) -> None:
    thread = start()
    peers = [dial(thread).join(part=0), dial(thread).join(part=1, fingerprint=FINGERPRINT | {"model": "b"})]
    peers.append(dial(thread).join(kind="guard", part=1))
    texts = {peer.receive(FrameType.REJECTED)["message"] for peer in peers}
    assert texts == {'the parts of the gang disagree:\n  model: part0="a"  part1="b"'}


def test_rejection_after_the_timeout_names_missing_parts(start: Start, dial: Dial) -> None:
    thread = start(gang_timeout_min=0.01)
    text = dial(thread).join().receive(FrameType.REJECTED)["message"]
    missing = thread.coordinator.part_spec.plan.describe_part(1)
    assert text == f"gave up after 0.01 minutes (GANG_TIMEOUT_MIN): missing {missing}"


def test_worker_that_left_before_the_gang_formed_may_join_again(start: Start, dial: Dial) -> None:
    thread = start()
    dial(thread).join(part=1).close()
    until(lambda: not thread.coordinator._peers)
    form(thread, dial)


def test_two_parts_with_one_world_rank_are_both_rejected(start: Start, dial: Dial) -> None:
    thread = start()
    twins = [dial(thread).join(), dial(thread).join()]
    for _ in range(6):
        twins[0].beat("rendezvous")
        twins[0].receive(FrameType.GANG_STATUS)
    texts = {twin.receive(FrameType.REJECTED)["message"] for twin in twins}
    assert len(texts) == 1
    assert "part0 is claimed twice, by 127.0.0.1:" in next(iter(texts))
    assert "check WORLD_RANK" in next(iter(texts))


def test_twin_of_a_serving_part_is_rejected_alone(start: Start, dial: Dial) -> None:
    thread = start()
    first, second = form(thread, dial)
    twin = dial(thread).join(part=1)
    for _ in range(6):
        second.beat(part=1)
        first.receive(FrameType.GANG_STATUS)
    assert "part1 is claimed twice" in twin.receive(FrameType.REJECTED)["message"]
    assert FrameType.REJECTED not in [frame_type for frame_type, _ in [*first.pending(), *second.pending()]]


def test_recreated_part_takes_the_place_of_its_dead_connection(start: Start, dial: Dial) -> None:
    """Its machine lost power, so the first connection is still open, and silent."""
    thread = start(heartbeat_timeout=2)
    first, _dead = form(thread, dial)
    again = dial(thread).join(part=1)
    while not any(frame_type == FrameType.EPOCH_ENDED for frame_type, _ in first.pending()):
        first.beat()
        again.beat("rendezvous", part=1)
    first.join(resident_rank=0)
    assert [peer.receive(FrameType.WELCOME)["epoch"] for peer in (first, again)] == [2, 2]


# Epochs


def test_survivor_keeps_its_rank_and_the_spare_takes_the_lost_one(start: Start, dial: Dial) -> None:
    thread = start(num_parts=1)
    workers = [dial(thread).join(index=index) for index in range(2)]
    assert [worker.receive(FrameType.WELCOME)["rank"] for worker in workers] == [0, 1]
    spare = dial(thread).join(index=2)
    workers[0].close()
    ended = workers[1].receive(FrameType.EPOCH_ENDED)
    assert (ended["epoch"], ended["restart"]) == (1, False)
    assert ended["reason"].startswith("lost rank 0 (127.0.0.1:")
    assert not any(frame_type == FrameType.WELCOME for frame_type, _ in spare.pending()), "rank 1 is still leaving"
    workers[1].join(index=1, resident_rank=1, num_blocks=77, max_seq_len=500)
    welcomes = [worker.receive(FrameType.WELCOME) for worker in (spare, workers[1])]
    assert [w["rank"] for w in welcomes] == [0, 1]
    assert {(w["epoch"], w["num_blocks"], w["max_seq_len"]) for w in welcomes} == {(2, 77, 500)}


def test_the_stop_of_part_0_is_logged_once(start: Start, dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    thread = start(num_parts=1)
    workers = [dial(thread).join(index=index) for index in range(2)]
    for worker in workers:
        worker.receive(FrameType.WELCOME)
    stopping_file(thread.coordinator.part_spec.run_dir).touch()
    for worker in workers:
        worker.close()
    until(lambda: not thread.coordinator.rendezvous.workers)
    with thread.paused():  # it has finished what it does about the last one
        pass
    assert [r.getMessage() for r in caplog.records if "stopping" in r.getMessage()] == [
        "epoch 1 ends: part0 is stopping"
    ]


def test_restarted_worker_becomes_the_spare(start: Start, dial: Dial) -> None:
    thread = start(num_parts=1)
    workers = [dial(thread).join(index=index) for index in range(2)]
    for worker in workers:
        worker.receive(FrameType.WELCOME)
    spare = dial(thread).join(index=2)
    spare.close()
    frames = [frame for worker in workers for frame in worker.pending()]
    assert {frame_type for frame_type, _ in frames} == {FrameType.GANG_STATUS}, "nobody needs a spare"
    assert all(message["in_epoch"] for _, message in frames)


def test_the_number_of_an_epoch_survives_the_coordinator_and_its_incarnation_does_not(start: Start, dial: Dial) -> None:
    first = start()
    form(first, dial)
    second = start()
    form(second, dial, epoch=2)
    assert first.coordinator.incarnation != second.coordinator.incarnation


def test_new_coordinator_forms_the_gang_from_what_the_workers_have(start: Start, dial: Dial) -> None:
    thread = start()
    peers = [dial(thread).join(part=part, resident_rank=part, num_blocks=9, max_seq_len=88) for part in range(2)]
    sizes = [(w["num_blocks"], w["max_seq_len"]) for w in (peer.receive(FrameType.WELCOME) for peer in peers)]
    assert sizes == [(9, 88)] * 2


def test_change_of_phase_is_told_at_once(monkeypatch: pytest.MonkeyPatch, start: Start, dial: Dial) -> None:
    """Ranks wait until all have loaded: without the extra status they would learn it an hour later."""
    thread = start()
    monkeypatch.setattr(coordinator, "HEARTBEAT_INTERVAL_SECONDS", 3600)
    first, second = form(thread, dial)
    for phase in ("loading", "warmup", "serving"):
        second.beat(phase, part=1)
        first.receive_until(
            FrameType.GANG_STATUS,
            lambda status: status["ranks"].get("1", {}).get("phase") == phase,  # noqa: B023
        )


@pytest.mark.parametrize("served", [True, False])
def test_failure_that_no_lost_rank_explains_ends_the_epoch(start: Start, dial: Dial, served: bool) -> None:
    """If it happens before the gang served, only new processes can help."""
    thread = start()
    peers = form(thread, dial)
    for part, peer in enumerate(peers):
        peer.beat("serving" if served else "warmup", part=part)
    until(lambda: thread.coordinator._has_served == served)
    peers[1].send(FrameType.EPOCH_ENDED, {"epoch": 0, "reason": "of the epoch before"})
    peers[1].send(FrameType.EPOCH_ENDED, {"epoch": 1, "reason": "network unreachable"})
    for peer in peers:
        ended = peer.receive(FrameType.EPOCH_ENDED)
        assert ended == {"epoch": 1, "reason": "rank 1: network unreachable", "restart": not served}


def test_repeated_failures_after_serving_restart_the_processes(start: Start, dial: Dial) -> None:
    thread = start(restart_limit=1)
    peers = form(thread, dial)
    for restart in (False, True):
        for part, peer in enumerate(peers):
            peer.beat("serving", part=part)
        until(lambda: thread.coordinator._has_served)
        epoch = thread.coordinator._epoch
        peers[0].send(FrameType.EPOCH_ENDED, {"epoch": epoch, "reason": "x"})
        assert [peer.receive(FrameType.EPOCH_ENDED)["restart"] for peer in peers] == [restart] * 2
        for part, peer in enumerate(peers):
            peer.hello(part=part, resident_rank=part)
        for peer in peers:
            peer.receive(FrameType.WELCOME)


def test_a_lost_rank_explains_what_its_peers_report(start: Start, dial: Dial) -> None:
    """They often notice the lost connection before the coordinator does."""
    first, second = form(start(), dial)
    first.send(FrameType.EPOCH_ENDED, {"epoch": 1, "reason": "connection reset"})
    second.close()
    assert first.receive(FrameType.EPOCH_ENDED)["reason"].startswith("lost rank 1 (")


# Ranks that hang


def kills(guard: Peer) -> list[tuple[int, str]]:
    """Returns pid and reason of all KILL frames that have arrived."""
    return [(m["pid"], m["reason"]) for frame_type, m in guard.pending() if frame_type == FrameType.KILL]


def test_guard_of_its_part_is_told_to_kill_a_silent_rank(start: Start, dial: Dial) -> None:
    thread = start(heartbeat_timeout=2)
    first, _second = form(thread, dial)
    guards = [dial(thread).join(kind="guard", part=part) for part in range(2)]
    told: list[list[tuple[int, str]]] = [[], []]
    while not told[1]:
        first.beat()
        for guard, reasons in zip(guards, told, strict=True):
            guard.send(FrameType.HEARTBEAT, {})
            reasons += kills(guard)
    assert told == [[], [(1001, "no heartbeat for 2 s")]]
    assert "no heartbeat for 2 s" in first.receive(FrameType.EPOCH_ENDED)["reason"]


def test_worker_that_imports_torch_may_be_silent(start: Start, dial: Dial) -> None:
    """Loading the libraries of torch from a cold disk holds the lock that its heartbeats need."""
    thread = start(heartbeat_timeout=2)
    guard = dial(thread).join(kind="guard", part=1)
    first, importing = form(thread, dial)
    importing.beat("rendezvous", part=1, is_importing=True)
    spares = [dial(thread).join(part=1, index=index, pid=2000 + index) for index in (1, 2)]
    spares[0].beat("rendezvous", part=1, is_importing=True)
    told: list[tuple[int, str]] = []
    while not told:
        first.beat()
        guard.send(FrameType.HEARTBEAT, {})
        told += kills(guard)
    assert [pid for pid, _ in told] == [2002]
    assert first.receive(FrameType.GANG_STATUS)["in_epoch"]


def test_frozen_part_is_not_killed(start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """If its guard is silent as well, the whole machine is stopped or cut off, and its ranks may go on later."""
    monkeypatch.setattr(coordinator, "SILENT_SECONDS", 1.0)
    thread = start(heartbeat_timeout=2)
    first, _second = form(thread, dial)
    guard = dial(thread).join(kind="guard", part=1)
    while not any(frame_type == FrameType.EPOCH_ENDED for frame_type, _ in first.pending()):
        first.beat()
    assert FrameType.KILL not in guard.rest()


@pytest.mark.parametrize(
    ("statuses", "victims"),
    [
        ([{"idle_s": 11.0, "progress_count": 8}, {"idle_s": 12.0, "progress_count": 7}], [1001]),
        ([{"idle_s": 12.0, "progress_count": 7}, {"idle_s": 11.0, "progress_count": 8}], [1000]),
        ([{"idle_s": 11.0, "progress_count": 7}, {"idle_s": 11.0, "progress_count": 7}], [1000, 1001]),
        ([{"idle_s": 11.0, "in_collective": True}, {"idle_s": 11.0}], [1001]),
        ([{"idle_s": 11.0}, {"idle_s": 11.0, "in_collective": True}], [1000]),
        ([{"idle_s": 11.0, "in_collective": True}, {"idle_s": 11.0, "in_collective": True}], [1000, 1001]),
        ([{"idle_s": 0.0, "progress_count": 9}, {"idle_s": 11.0, "progress_count": 9}], [1001]),
        ([{"idle_s": 9.0}, {"idle_s": 9.0}], []),
        ([{"idle_s": 11.0, "longest_s": 0.6}, {"idle_s": 11.0, "longest_s": 0.6}], []),
        ([{"idle_s": 13.0, "longest_s": 0.6}, {"idle_s": 13.0, "longest_s": 0.7}], [1000]),
        ([{"idle_s": 99.0, "phase": "loading"}, {"idle_s": 99.0, "phase": "warmup"}], []),
        ([{"idle_s": 0.0, "phase": "loading"}, {"idle_s": 301.0, "phase": "loading"}], [1001]),
    ],
)
def test_of_the_ranks_without_progress_the_one_furthest_behind_is_killed(
    start: Start, dial: Dial, statuses: list[dict[str, Any]], victims: list[int]
) -> None:
    """The others wait for it in a collective. A rank may take 20 times its longest layer or step, at least 10 s."""
    thread = start()
    guards = [dial(thread).join(kind="guard", part=part) for part in range(2)]
    peers = form(thread, dial)
    with thread.paused():
        for part, (peer, status) in enumerate(zip(peers, statuses, strict=True)):
            peer.beat(part=part, **status)
    told = [pid for guard in guards for pid, _ in kills(guard)]
    assert told == victims


# The secret


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (b"a", b"b", "GANG_SECRET of the other part is not the one of this part"),
        (b"a", b"", "GANG_SECRET is set on this part and not set on the other"),
        (b"", b"b", "GANG_SECRET is not set on this part and set on the other"),
    ],
    ids=["different", "only here", "only there"],
)
def test_peer_without_the_secret_is_dropped_and_named(
    start: Start, dial: Dial, caplog: pytest.LogCaptureFixture, ours: bytes, theirs: bytes, reason: str
) -> None:
    thread = start(secret=ours)
    first, second = dial(thread).join(secret=ours), dial(thread)
    second.hello(part=1, secret=theirs)
    assert second.rest() == []
    until(lambda: reason in caplog.text)
    assert [r.levelno for r in caplog.records if reason in r.getMessage()] == [logging.WARNING]
    first.receive_until(FrameType.GANG_STATUS, lambda status: reason in status["message"])
    dial(thread).join(part=1, secret=ours)
    assert first.receive(FrameType.WELCOME)["rank"] == 0


def test_signature_of_another_connection_is_worth_nothing(start: Start, dial: Dial) -> None:
    thread = start(secret=b"a")
    recorded, replayed = dial(thread), dial(thread)
    replayed.challenge = recorded.challenge
    replayed.hello(secret=b"a")
    assert replayed.rest() == []


def test_flood_of_strangers_is_one_log_line(start: Start, dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    thread = start()
    for _ in range(20):
        stranger = dial(thread)
        stranger.sock.sendall(NOISE["http"])
        assert stranger.rest() == []
    until(lambda: caplog.text)
    assert caplog.text.count("rendezvous port: closed the connection from 127.0.0.1:") == 1
