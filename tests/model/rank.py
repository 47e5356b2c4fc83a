"""One rank of a tensor-parallel group: `python -m tests.model.rank SIZE RANK PORT CONTROL_FD`.

A job is a checkpoint, settings and requests to complete. Importing torch takes seconds, so a process runs all jobs of a
test session. Jobs and replies are JSON in frames of `parallel.wire` over the inherited socket CONTROL_FD; the process
exits when that socket closes, also if pytest has died.
"""

import json
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtp_llm.config import Config
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.loop import FollowerConnections
from rtp_llm.native.library import select_kernels
from rtp_llm.parallel.gang_client import Assignment
from rtp_llm.parallel.group import Communicator, init_group
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.part_spec import ModelInfo, PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET, Plan
from rtp_llm.parallel.rendezvous import KVCacheSize
from rtp_llm.parallel.step_connections import accept_ranks, connect_to_leader, join_leader
from rtp_llm.parallel.wire import FrameType, WireError, listen, pack_json, recv_frame
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive

HOST = "127.0.0.1"
EPOCH = "test-1"
TIMEOUT_SECONDS = 60  # of connecting to peers, and of each collective


def local_plan(size: int, port: int) -> Plan:
    return Plan((Member(0, "local_part0", HOST, port),), 0, size, size, size, port, 9, "cpu")


def make_assignment(rank: int, epoch: int = 1) -> Assignment:
    return Assignment(rank, epoch, "test", HOST, KVCacheSize())


def open_groups(plan: Plan, rank: int) -> dict[str, Communicator]:
    """Returns two groups of the same ranks: "local" as on one machine, and "gloo" as between machines."""

    def open_group(plan: Plan, shm_prefix: str) -> Communicator:
        return init_group(
            plan,
            rank,
            EPOCH,
            host=HOST,
            address=HOST,
            timeout=TIMEOUT_SECONDS,
            device=torch.device("cpu"),
            shm_prefix=shm_prefix,
        )

    local = open_group(plan, f"rtp-test-{plan.start_port}-")
    return {"local": local, "gloo": open_group(local_plan(plan.world_size, plan.start_port + 1), "")}


class RankWorker:
    """One rank that runs jobs. Its process groups and the sockets for steps between rank 0 and the others are opened
    once."""

    def __init__(self, size: int, rank: int, port: int):
        plan = local_plan(size, port)
        config = Config.model_validate({"dist_comm_timeout": TIMEOUT_SECONDS})
        part_spec = PartSpec(Path(), config, plan, ModelInfo("random", "qwen3", "fp32", 2048), {}, tty=False)
        self.groups = open_groups(plan, rank)
        self.followers: FollowerConnections | None = None
        self.step_socket: socket.socket | None = None
        if rank == 0:
            self.followers = FollowerConnections(_accept_followers(part_spec), TIMEOUT_SECONDS)
        else:
            self.step_socket = connect_to_leader(part_spec, lambda: None)
            join_leader(self.step_socket, part_spec, make_assignment(rank))
            self.step_socket.settimeout(None)  # a session may run no job for long

    def run_job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Loads the checkpoint and computes the job's requests. Returns the reply of this rank."""
        select_kernels(job["settings"].get("rtp_cpu_kernels", "auto"))
        group = self.groups[job["collectives"]]
        runner, load_stats = drive.load_runner(Path(job["checkpoint"]), job["settings"], group)
        reply: dict[str, Any] = {"bytes": load_stats.bytes, "num_blocks": runner.residency.num_blocks}
        if self.followers:
            engine = drive.make_engine(runner, self.followers.broadcast)
            completions = _run_leader(engine, job)
            self.followers.send_keepalive()  # _run_follower returns when it receives this
            reply |= {"completions": completions, "preemptions": engine.scheduler.stats.preemptions}
        else:
            assert self.step_socket
            _run_follower(runner, self.step_socket)
        recorded_steps = runner.residency._recorded_steps
        return reply | {"num_recorded": len(recorded_steps._steps) if recorded_steps else 0}


def _accept_followers(part_spec: PartSpec) -> dict[int, socket.socket]:
    if part_spec.plan.world_size == 1:
        return {}
    with listen(HOST, part_spec.plan.leader_port(STEP_PORT_OFFSET)) as listener:
        return accept_ranks(listener, part_spec, make_assignment(0))


def _run_follower(runner: ModelRunner, step_socket: socket.socket) -> None:
    while True:
        frame_type, payload = recv_frame(step_socket)
        if frame_type == FrameType.KEEPALIVE:
            return
        inputs = runner.prepare(Step.from_bytes(payload))
        inputs.check_digest()
        runner.execute(inputs)


def _run_leader(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Runs the job's waves (lists of requests) one after the other, each until all its requests have ended.

    Writes the logits, which are too large for the reply, to the file `out`. Returns the completions without them.
    """
    completions: drive.Completions = {}
    for wave in job["waves"]:
        completions |= drive.run(engine, [_request(entry) for entry in wave])
    np.savez(job["out"], allow_pickle=False, **{id: np.stack(c.logits) for id, c in completions.items()})
    return {id: asdict(replace(completion, logits=[])) for id, completion in completions.items()}


def _request(entry: dict[str, Any]) -> Request:
    return Request(entry["id"], entry["prompt"], SamplingParams.from_json(entry["params"]), entry["output"])


def main(size: int, rank: int, port: int, control_fd: int) -> None:
    torch.set_num_threads(1)
    control = socket.socket(fileno=control_fd)
    worker = RankWorker(size, rank, port)
    control.sendall(pack_json(FrameType.READY, {}))
    while True:
        try:
            _, payload = recv_frame(control)
        except WireError:
            return
        control.sendall(pack_json(FrameType.EVENTS, worker.run_job(json.loads(payload))))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
