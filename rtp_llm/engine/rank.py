"""Runs one rank after the rendezvous: loads what it keeps, then serves one epoch of the gang after the other."""

import torch

from rtp_llm.engine.epoch import Epoch
from rtp_llm.errors import ConfigError, GpuError
from rtp_llm.machine.devices import usable_cores
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.parallel.gang_client import GangClient
from rtp_llm.parallel.mesh import Mesh
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.runner.progress import ProgressBar
from rtp_llm.runner.residency import Residency


def serve_rank(part_spec: PartSpec, gang: GangClient) -> None:
    """Runs one rank until the process ends. Raises FatalError, for example if a peer is lost."""
    try:
        _serve(part_spec, gang)
    except torch.AcceleratorError as error:
        raise GpuError(f"the GPU failed: {error}") from error


def _serve(part_spec: PartSpec, gang: GangClient) -> None:
    config, plan = part_spec.config, part_spec.plan
    mesh, device = Mesh.of(plan, gang.rank_status.rank), _select_device(part_spec, gang.rank_status.rank)
    torch.set_num_threads(config.rtp_threads or max(1, usable_cores() // plan.local_world_size))
    residency: Residency | None = None
    for number in gang.epochs():
        with Epoch(part_spec, number, gang, mesh, device) as epoch:
            gang.abort_epoch = epoch.abort
            # Loaded within the first epoch: it fails within seconds if the ranks cannot reach each other.
            residency = residency or _load(part_spec, gang, mesh, device)
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
    """Loads the weights and, when all ranks have theirs, allocates the KV cache."""
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
    rank_status.set_phase("warmup")
    gang.wait_until_loaded()
    residency.allocate_kv_cache(plan.local_world_size if device.type == "cpu" else 1)
    rank_status.kv_bytes = residency.kv_bytes
    return residency
