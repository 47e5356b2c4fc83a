"""From a seat in the gang to a serving rank: group, weights, KV cache, loop."""

import logging
import socket
from typing import Any

import torch

from rtp_llm.engine.blocks import BlockPool
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.intake import Intake
from rtp_llm.engine.loop import Followers, Leader, follow
from rtp_llm.engine.scheduler import Limits, Scheduler
from rtp_llm.errors import ConfigError, GpuError
from rtp_llm.machine.devices import usable_cores
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.parallel.gang import Gang, accept_ranks, leader_host, retry_connect
from rtp_llm.parallel.group import Group, open_group
from rtp_llm.parallel.handover import Handover
from rtp_llm.parallel.plan import STEP
from rtp_llm.parallel.wire import Kind, connect, listen, pack_json
from rtp_llm.runner.progress import Progress
from rtp_llm.runner.runner import Runner

log = logging.getLogger(__name__)


def serve_rank(handover: Handover, gang: Gang) -> None:
    """Runs until the process is ended, or a peer is lost. Raises FatalError with the reason."""
    try:
        _serve(handover, gang)
    except torch.AcceleratorError as error:
        raise GpuError(f"the GPU failed: {error}") from error


def _serve(handover: Handover, gang: Gang) -> None:
    config, plan, rank = handover.config, handover.plan, gang.pulse.rank
    device = _device(handover, rank)
    torch.set_num_threads(config.rtp_threads or max(1, usable_cores() // plan.local_world_size))
    group = open_group(
        plan,
        rank,
        gang.epoch,
        host=leader_host(plan),
        address=gang.address,
        timeout=config.dist_comm_timeout,
        device=device,
        shm_prefix=handover.shm_prefix,
    )
    runner = _load(handover, gang, group, device)
    if rank == 0:
        _lead(handover, gang, runner)
    else:
        sock = _connect_steps(handover, gang)
        log.info("rank %d follows", rank)
        follow(runner, sock, gang.pulse, gang.epoch)


def _device(handover: Handover, rank: int) -> torch.device:
    if handover.plan.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"RTP_DEVICE=cuda: torch {torch.__version__} sees no GPU; install its CUDA build, or set cpu")
    device = torch.device("cuda", rank % handover.plan.local_world_size)
    torch.cuda.set_device(device)
    return device


def _load(handover: Handover, gang: Gang, group: Group, device: torch.device) -> Runner:
    config, plan, pulse = handover.config, handover.plan, gang.pulse
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    pulse.enter("loading")
    bar = Progress(f"[{handover.who}] weights", tty=handover.tty, silent=pulse.rank != plan.first_rank)

    def progress(share: float) -> None:
        pulse.progress = share
        pulse.touch()
        bar(share)

    runner = Runner(config, spec, group, device, config.max_seq_len or spec.max_positions)
    report = runner.load(checkpoint, progress)
    pulse.weight_bytes = report.bytes
    pulse.enter("warmup")
    gang.wait_until_loaded()
    runner.allocate(plan.local_world_size if device.type == "cpu" else 1)
    pulse.kv_bytes = runner.kv_bytes
    return runner


def _lead(handover: Handover, gang: Gang, runner: Runner) -> None:
    config, plan = handover.config, handover.plan
    peers: dict[int, socket.socket] = {}
    if plan.world_size > 1:
        host = "0.0.0.0" if plan.spans_parts else "127.0.0.1"
        with listen(host, plan.leader_port(STEP)) as listener:
            peers = accept_ranks(listener, plan, gang.epoch, config.dist_comm_timeout)
    followers = Followers(peers, config.dist_comm_timeout)
    blocks = BlockPool(runner.num_blocks, runner.block_size, config.reuse_cache)
    scheduler = Scheduler(blocks, Limits(runner.max_tokens, config.max_sequences, config.max_context_batch_size))
    engine = Engine(scheduler, runner, runner.max_seq_len, gang.epoch, followers.publish)
    intake = Intake(handover.engine_socket, _ready(gang, runner))
    gang.pulse.enter("serving")
    rope = runner.spec.rope
    log.info("serving: epoch %d, sequences of up to %d tokens", gang.epoch, runner.max_seq_len)
    salt_above = rope.original_max if rope.kind == "dynamic" else 0
    Leader(engine, intake, followers, gang.pulse, runner, salt_above).run()


def _ready(gang: Gang, runner: Runner) -> dict[str, Any]:
    """What the API process must know of the engine."""
    return {
        "epoch": gang.epoch,
        "max_seq_len": runner.max_seq_len,
        "vocab_size": runner.spec.vocab_size,
        "block_size": runner.block_size,
        "num_blocks": runner.num_blocks,
        "prefix_caching": runner.config.reuse_cache,
        "family": runner.spec.family,
        "dtype": runner.spec.dtype,
    }


def _connect_steps(handover: Handover, gang: Gang) -> socket.socket:
    plan, timeout = handover.plan, handover.config.dist_comm_timeout
    sock = retry_connect(lambda: connect(leader_host(plan), plan.leader_port(STEP), timeout), timeout)
    sock.sendall(pack_json(Kind.JOIN, {"rank": gang.pulse.rank, "epoch": gang.epoch}))
    return sock
