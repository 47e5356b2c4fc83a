"""OpenVINO GenAI's continuous batching pipeline as a target of a benchmark. Runs a GGUF file. Needs the package
`openvino-genai` and, to convert a checkpoint to GGUF, the package `gguf`.
"""

from typing import Any

import numpy as np
import openvino
import openvino_genai

from rtp_llm.bench.peers.worker import serve


class OpenVino:
    def __init__(self, path: str, settings: dict[str, Any]):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = settings.pop("cache_gib", 2)
        scheduler.max_num_batched_tokens = settings.pop("max_num_batched_tokens", scheduler.max_num_batched_tokens)
        scheduler.max_num_seqs = 256
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", settings)
        self._handles: dict[int, Any] = {}
        self._next_id = 0  # of the pipeline, which never takes an id twice

    def add(self, id: int, prompt: list[int], output_tokens: int) -> None:
        generation = openvino_genai.GenerationConfig()
        generation.max_new_tokens = generation.min_new_tokens = output_tokens
        generation.ignore_eos, generation.do_sample = True, False
        ids = openvino.Tensor(np.array([prompt], np.int64))
        self._handles[id] = self._pipeline.add_request(self._next_id, ids, generation)
        self._next_id += 1

    def step(self) -> dict[int, int]:
        self._pipeline.step()
        counts = {}
        for id, handle in list(self._handles.items()):
            if handle.can_read():
                counts[id] = sum(len(output.generated_ids) for output in handle.read().values())
            if str(handle.get_status()).endswith("FINISHED"):
                del self._handles[id]
        return counts


def load(path: str, settings: dict[str, Any]) -> tuple[OpenVino, str]:
    return OpenVino(path, dict(settings)), f"OpenVINO GenAI {openvino_genai.__version__}"


if __name__ == "__main__":
    serve(load)
