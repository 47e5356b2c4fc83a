"""An epoch is aborted in the middle of a step on this device; a second one on the same residency continues the request.

A server of one rank has no communicator to abort. Here its epochs get one over the backend of this device.
"""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from rtp_llm.engine.epoch import Epoch
from rtp_llm.parallel.gang_client import GangClient
from rtp_llm.parallel.group import SingleRankGroup, open_torch_group
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.residency import Residency
from tests import random_model
from tests.gpu.plugin import Note
from tests.model import drive
from tests.model.conftest import _one_thread  # noqa: F401  # applies to these tests, too
from tests.model.rank import local_plan, make_assignment
from tests.ports import free_start_port
from tests.seams.test_epoch import MAX_TOKENS, PROMPT, TIMEOUT_SECONDS, ApiConnection, make_part_spec


@contextmanager
def serving_epoch(part_spec: PartSpec, number: int, residency: Residency) -> Iterator[Epoch]:
    """Yields an epoch that a thread serves. It must have been aborted, and must then end without an error."""
    gang = cast(GangClient, SimpleNamespace(rank_status=RankStatus(0), check_epoch=lambda: None))
    group = open_torch_group(dist.HashStore(), 0, 1, TIMEOUT_SECONDS, residency.device)
    epoch = Epoch(part_spec, make_assignment(0, number), gang, residency.mesh, residency.device)
    errors = []

    def serve() -> None:
        try:
            with mock.patch("rtp_llm.engine.epoch.init_group", return_value=group), epoch:
                epoch.form()
                epoch.serve(residency)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield epoch
    thread.join(TIMEOUT_SECONDS)
    assert not thread.is_alive(), "the epoch does not end"
    assert errors == []


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_second_epoch_continues_on_the_same_residency(
    device: torch.device, pipeline_depth: int, tmp_path: Path, note: Note
) -> None:
    checkpoint = tmp_path / "model"
    random_model.write(checkpoint)
    settings = {"rtp_pipeline_depth": pipeline_depth}
    residency = drive.load_runner(checkpoint, settings, SingleRankGroup(), device)[0].residency
    engine = drive.make_engine(ModelRunner(residency))
    expected = drive.run(engine, [drive.greedy_request(PROMPT, MAX_TOKENS)])["0"].tokens
    assert len(expected) == MAX_TOKENS
    (checkpoint / "model.safetensors").unlink()
    part_spec = replace(
        make_part_spec(tmp_path, checkpoint), config=residency.config, plan=local_plan(1, free_start_port())
    )
    (path,) = part_spec.engine_sockets
    with serving_epoch(part_spec, 1, residency) as epoch, closing(ApiConnection(path, epoch=1)) as api:
        api.submit("a", [])
        tokens = api.receive(limit=5)
        epoch.abort("a test aborts")
        tokens += api.receive()
    assert 5 <= len(tokens) < MAX_TOKENS
    with serving_epoch(part_spec, 2, residency) as epoch, closing(ApiConnection(path, epoch=2)) as api:
        api.submit("a", tokens)
        assert tokens + api.receive() == expected
        graphs = residency._cuda_graphs
        assert (graphs is not None and len(graphs._steps) > 0) == (device.type == "cuda"), "captured again"
        api.submit("b", [])
        others = api.receive(limit=5)
        epoch.abort("a test aborts")
        others += api.receive()
    assert others == expected[: len(others)]
    note("reason", f"aborted after {len(tokens)} of {MAX_TOKENS} tokens")
