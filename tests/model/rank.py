"""One rank of a tensor-parallel group: `python -m tests.model.rank SIZE RANK PORT CONTROL_FD`.

Importing torch takes seconds, so a process lives for a whole session and does one job after the other. Jobs and
replies are the product's own frames over an inherited socket; its end (pytest has died) ends the process.
"""

import json
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.loop import FollowerConnections
from rtp_llm.parallel.gang_client import accept_ranks, retry_connect
from rtp_llm.parallel.group import Group, TorchGroup, init_group
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import STEP_PORT_OFFSET, Plan
from rtp_llm.parallel.wire import FrameType, WireError, connect, listen, pack_json, recv_frame
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive

HOST = "127.0.0.1"
EPOCH = 1
SECONDS = 60  # for peers to connect, and for a collective


def plan_for(size: int, port: int) -> Plan:
    return Plan((Member(0, "local_part0", HOST, port),), 0, size, size, size, port, 9, "cpu")


def open_groups(plan: Plan, rank: int) -> dict[str, Group]:
    """The product's own choice for ranks of one machine, and gloo for everything, as it is used between machines."""
    cpu = torch.device("cpu")
    prefix = f"rtp-test-{plan.start_port}-"
    group = init_group(plan, rank, EPOCH, host=HOST, address=HOST, timeout=SECONDS, device=cpu, shm_prefix=prefix)
    gloo = TorchGroup(rank, plan.world_size, cpu) if plan.world_size > 1 else group
    return {"local": group, "gloo": gloo}


class Rank:
    """Groups and step sockets, formed once for all jobs."""

    def __init__(self, size: int, rank: int, port: int):
        plan = plan_for(size, port)
        self.groups = open_groups(plan, rank)
        self.followers: FollowerConnections | None = None
        self.steps: socket.socket | None = None
        if rank == 0:
            self.followers = FollowerConnections(_accept(plan), SECONDS)
        else:
            self.steps = retry_connect(lambda: connect(HOST, plan.leader_port(STEP_PORT_OFFSET), SECONDS), SECONDS)
            self.steps.sendall(pack_json(FrameType.JOIN, {"rank": rank, "epoch": EPOCH}))

    def work(self, job: dict[str, Any]) -> dict[str, Any]:
        runner, report = drive.load(Path(job["checkpoint"]), job["settings"], self.groups[job["collectives"]])
        reply: dict[str, Any] = {"bytes": report.bytes, "num_blocks": runner.num_blocks}
        if self.followers:
            engine = drive.engine_of(runner, self.followers.broadcast)
            outcomes = _lead(engine, job)
            self.followers.send_keepalive()  # here: the end of the job
            return reply | {"outcomes": outcomes, "preemptions": engine.scheduler.stats.preemptions}
        assert self.steps
        _follow(runner, self.steps)
        return reply


def _accept(plan: Plan) -> dict[int, socket.socket]:
    if plan.world_size == 1:
        return {}
    with listen(HOST, plan.leader_port(STEP_PORT_OFFSET)) as listener:
        return accept_ranks(listener, plan, EPOCH, SECONDS)


def _follow(runner: ModelRunner, steps: socket.socket) -> None:
    while True:
        kind, payload = recv_frame(steps)
        if kind == FrameType.KEEPALIVE:
            return
        runner.execute(Step.from_bytes(payload))


def _lead(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Leaves the logits in the file `out`; all else is small enough for the reply."""
    outcomes: drive.Outcomes = {}
    for wave in job["waves"]:
        outcomes |= drive.run(engine, [_request(entry) for entry in wave])
    np.savez(job["out"], allow_pickle=False, **{id: np.stack(o.logits) for id, o in outcomes.items()})
    return {id: asdict(replace(outcome, logits=[])) for id, outcome in outcomes.items()}


def _request(entry: dict[str, Any]) -> Request:
    return Request(entry["id"], entry["prompt"], SamplingParams.from_json(entry["params"]), entry["output"])


def main(size: int, rank: int, port: int, control_fd: int) -> None:
    torch.set_num_threads(1)
    control = socket.socket(fileno=control_fd)
    seat = Rank(size, rank, port)
    control.sendall(pack_json(FrameType.READY, {}))
    while True:
        try:
            _, payload = recv_frame(control)
        except WireError:
            return
        control.sendall(pack_json(FrameType.EVENTS, seat.work(json.loads(payload))))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
