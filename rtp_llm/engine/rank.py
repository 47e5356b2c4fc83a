"""Runs one rank after the rendezvous: process group, weights, KV cache, main loop."""

import logging
import socket
from dataclasses import asdict

import torch

from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.engine.blocks import BlockPool
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.loop import FollowerConnections, LeaderLoop, follower_loop
from rtp_llm.engine.request_server import RequestServer
from rtp_llm.engine.scheduler import Scheduler, SchedulerConfig
from rtp_llm.errors import ConfigError, GpuError
from rtp_llm.machine.devices import usable_cores
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.parallel.gang_client import GangClient, accept_ranks, leader_host, retry_connect
from rtp_llm.parallel.group import Group, init_group
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.wire import FrameType, connect, listen, pack_json
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.progress import ProgressBar

log = logging.getLogger(__name__)


def serve_rank(part_spec: PartSpec, gang: GangClient) -> None:
    """Runs one rank until the process ends. Raises FatalError, for example if another rank is lost."""
    try:
        _serve(part_spec, gang)
    except torch.AcceleratorError as error:
        raise GpuError(f"the GPU failed: {error}") from error


def _serve(part_spec: PartSpec, gang: GangClient) -> None:
    config, plan, rank = part_spec.config, part_spec.plan, gang.rank_status.rank
    device = _select_device(part_spec, rank)
    torch.set_num_threads(config.rtp_threads or max(1, usable_cores() // plan.local_world_size))
    group = init_group(
        plan,
        rank,
        gang.epoch,
        host=leader_host(plan),
        address=gang.address,
        timeout=config.dist_comm_timeout,
        device=device,
        shm_prefix=part_spec.shm_prefix,
    )
    runner = _load_model(part_spec, gang, group, device)
    if rank == 0:
        _run_leader(part_spec, gang, runner)
    else:
        sock = _connect_to_leader(part_spec, gang)
        log.info("rank %d is connected to rank 0 and waits for steps", rank)
        follower_loop(runner, sock, gang.rank_status, gang.epoch)


def _select_device(part_spec: PartSpec, rank: int) -> torch.device:
    if part_spec.plan.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"RTP_DEVICE=cuda: torch {torch.__version__} finds no GPU; install its CUDA build, or set RTP_DEVICE=cpu"
        )
    device = torch.device("cuda", rank % part_spec.plan.local_world_size)
    torch.cuda.set_device(device)
    return device


def _load_model(part_spec: PartSpec, gang: GangClient, group: Group, device: torch.device) -> ModelRunner:
    config, plan, rank_status = part_spec.config, part_spec.plan, gang.rank_status
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    rank_status.set_phase("loading")
    progress_bar = ProgressBar(
        f"[{part_spec.label}] weights", tty=part_spec.tty, silent=rank_status.rank != plan.first_rank
    )

    def on_progress(fraction: float) -> None:
        rank_status.progress = fraction
        rank_status.mark_progress()
        progress_bar(fraction)

    runner = ModelRunner(config, spec, group, device, config.max_seq_len or spec.max_positions)
    load_stats = runner.load(checkpoint, on_progress)
    rank_status.weight_bytes = load_stats.bytes
    rank_status.set_phase("warmup")
    gang.wait_until_loaded()
    runner.allocate_kv_cache(plan.local_world_size if device.type == "cpu" else 1)
    rank_status.kv_bytes = runner.kv_bytes
    return runner


def _run_leader(part_spec: PartSpec, gang: GangClient, runner: ModelRunner) -> None:
    config, plan = part_spec.config, part_spec.plan
    peers: dict[int, socket.socket] = {}
    if plan.world_size > 1:
        host = "0.0.0.0" if plan.is_multi_part else "127.0.0.1"
        with listen(host, plan.leader_port(STEP_PORT_OFFSET)) as listener:
            peers = accept_ranks(listener, plan, gang.epoch, config.dist_comm_timeout)
    followers = FollowerConnections(peers, config.dist_comm_timeout)
    blocks = BlockPool(runner.num_blocks, runner.block_size, config.reuse_cache)
    scheduler = Scheduler(
        blocks, SchedulerConfig(runner.max_num_batched_tokens, config.max_sequences, config.max_context_batch_size)
    )
    engine = Engine(scheduler, runner, runner.max_seq_len, gang.epoch, followers.broadcast)
    request_server = RequestServer(part_spec.engine_socket, asdict(_engine_info(gang, runner)))
    gang.rank_status.set_phase("serving")
    rope = runner.spec.rope
    log.info(
        "serving in epoch %d of the gang: prompt and output of a request may have %d tokens",
        gang.epoch,
        runner.max_seq_len,
    )
    cache_salt_above = rope.original_max if rope.kind == "dynamic" else 0
    LeaderLoop(engine, request_server, followers, gang.rank_status, runner, cache_salt_above).run()


def _engine_info(gang: GangClient, runner: ModelRunner) -> EngineInfo:
    return EngineInfo(
        epoch=gang.epoch,
        max_seq_len=runner.max_seq_len,
        vocab_size=runner.spec.vocab_size,
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        prefix_caching=runner.config.reuse_cache,
        family=runner.spec.family,
        dtype=runner.spec.dtype,
    )


def _connect_to_leader(part_spec: PartSpec, gang: GangClient) -> socket.socket:
    plan, timeout = part_spec.plan, part_spec.config.dist_comm_timeout
    host, port = leader_host(plan), plan.leader_port(STEP_PORT_OFFSET)
    sock = retry_connect(lambda: connect(host, port, timeout), f"{host}:{port}", timeout)
    sock.sendall(pack_json(FrameType.JOIN, {"rank": gang.rank_status.rank, "epoch": gang.epoch}))
    return sock
