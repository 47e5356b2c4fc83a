"""Runs one rank after the rendezvous: loads the weights once, then serves one epoch of the gang after another."""

import torch

from rtp_llm import garbage, log
from rtp_llm.engine.epoch import Epoch
from rtp_llm.errors import ConfigError, GpuError
from rtp_llm.machine.devices import usable_cores
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.native.library import select_kernels
from rtp_llm.parallel.gang_client import Assignment, GangClient
from rtp_llm.parallel.mesh import Mesh
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.rendezvous import KVCacheSize
from rtp_llm.runner.progress import ProgressBar
from rtp_llm.runner.residency import Residency


def serve_rank(part_spec: PartSpec, gang: GangClient) -> None:
    """Loads the model and runs one rank until the process ends. Raises FatalError, for example if the settings of the
    parts differ.
    """
    try:
        _serve(part_spec, gang)
    except torch.AcceleratorError as error:
        raise GpuError(f"the GPU failed: {error}") from error


def _serve(part_spec: PartSpec, gang: GangClient) -> None:
    config, plan = part_spec.config, part_spec.plan
    torch.set_num_threads(config.rtp_threads or max(1, usable_cores() // plan.local_world_size))
    select_kernels(config.rtp_cpu_kernels)
    residency: Residency | None = None
    for assignment in gang.epochs():
        if residency is None:
            log.setup(f"{part_spec.label} rank{assignment.rank}", config.log_level, style=config.log_format)
            mesh, device = Mesh.of(plan, assignment.rank), _select_device(part_spec, assignment.rank)
        with Epoch(part_spec, assignment, gang, mesh, device) as epoch:
            epoch.form()
            # Loaded within the first epoch: it fails within seconds if the ranks cannot reach each other.
            residency = residency or _load(part_spec, gang, mesh, device)
            _allocate_kv_cache(residency, part_spec, gang, assignment)
            epoch.serve(residency)


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


def _load(part_spec: PartSpec, gang: GangClient, mesh: Mesh, device: torch.device) -> Residency:
    """Loads this rank's weights."""
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

    residency = Residency(config, spec, mesh, device, config.max_seq_len or spec.max_positions)
    rank_status.weight_bytes = residency.load(checkpoint, on_progress).bytes
    if device.type == "cpu":  # the layers of a GPU are only queued when they are called
        residency.on_layer = rank_status.count_progress
    gang.resident_rank = rank_status.rank
    garbage.keep_all()
    return residency


def _allocate_kv_cache(residency: Residency, part_spec: PartSpec, gang: GangClient, assignment: Assignment) -> None:
    """Allocates the KV cache after all ranks have loaded their weights, unless this rank has kept its cache.

    If other ranks have a KV cache, its size is the same. Otherwise all ranks measure the free memory together.
    """
    gang.rank_status.set_phase("warmup")
    gang.wait_until_loaded()
    if residency.num_blocks:
        return
    size = assignment.kv_cache
    if size.num_blocks:
        residency.restore_kv_cache(size.num_blocks, size.max_seq_len)
    else:
        is_cpu = residency.device.type == "cpu"
        residency.allocate_kv_cache(part_spec.plan.local_world_size if is_cpu else 1)
    gang.kv_cache = KVCacheSize(residency.num_blocks, residency.max_seq_len)
    gang.rank_status.kv_bytes = residency.kv_bytes
