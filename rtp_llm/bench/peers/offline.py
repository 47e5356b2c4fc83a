"""`python -m rtp_llm.bench.peers.offline CHECKPOINT SETTINGS`: this project's engine as a target of a benchmark, on the
CPU, with one rank, without HTTP and tokenizer. SETTINGS: a JSON object, such as {"QUANTIZATION": "INT8"}.
"""

from typing import Any

import torch

from rtp_llm.bench.peers.worker import serve
from rtp_llm.config import load as load_config
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.epoch import make_scheduler
from rtp_llm.errors import ConfigError
from rtp_llm.machine.devices import usable_cores
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.parallel.mesh import Mesh, MeshAxis
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.residency import Residency


class Offline:
    def __init__(self, engine: Engine):
        self._engine = engine
        self._ids: dict[str, int] = {}
        self._next_id = 0  # of the engine

    def add(self, id: int, prompt: list[int], output_tokens: int) -> None:
        name = str(self._next_id)
        self._next_id += 1
        output = self._engine.add(Request(name, prompt, SamplingParams(max_tokens=output_tokens, temperature=0.0)))
        if output:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens leaves no room for output; allowed: MAX_SEQ_LEN less 1"
            )
        self._ids[name] = id

    def step(self) -> dict[int, int]:
        outputs = self._engine.step()
        counts = {self._ids[output.request_id]: len(output.tokens) for output in outputs if output.tokens}
        for output in outputs:
            if output.finish:
                del self._ids[output.request_id]
        return counts


def load(path: str, settings: dict[str, Any]) -> tuple[Offline, str]:
    defaults = {"CHECKPOINT_PATH": path, "KV_CACHE_MEM_MB": "2048", "RTP_DEVICE": "cpu"}
    config = load_config([], defaults | settings).config
    torch.set_num_threads(config.rtp_threads or usable_cores())
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    max_seq_len = config.max_seq_len or spec.max_positions
    residency = Residency(config, spec, Mesh(MeshAxis()), torch.device("cpu"), max_seq_len)
    residency.load(checkpoint, lambda fraction: None)
    residency.allocate_kv_cache(1)
    residency.begin_epoch()
    depth = config.rtp_pipeline_depth
    engine = Engine(make_scheduler(residency), ModelRunner(residency), residency.max_seq_len, 1, pipeline_depth=depth)
    return Offline(engine), f"rtp-llm without HTTP, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    serve(load)
