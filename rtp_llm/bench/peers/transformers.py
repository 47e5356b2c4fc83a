"""Hugging Face transformers as a target of a benchmark, with static batches: a batch has all waiting requests whose
prompts are equally long, and the next batch starts when all requests of this one are complete.
"""

from typing import Any

import torch
import transformers

from rtp_llm.bench.peers.worker import serve


class Transformers:
    def __init__(self, path: str, settings: dict[str, Any]):
        dtype = getattr(torch, settings.get("dtype", "bfloat16"))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._model.requires_grad_(False)
        self._waiting: list[tuple[int, list[int], int]] = []
        self._remaining: dict[int, int] = {}  # tokens to generate of each request in the batch, in order of its rows
        self._cache: Any = None
        self._tokens = torch.empty(0)  # [requests, tokens] that the next step computes

    def add(self, id: int, prompt: list[int], output_tokens: int) -> None:
        self._waiting.append((id, prompt, output_tokens))

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        if not any(left > 0 for left in self._remaining.values()):
            self._start_batch()
        output = self._model(self._tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        done = [id for id, left in self._remaining.items() if left > 0]
        self._remaining = {id: left - 1 for id, left in self._remaining.items()}
        return dict.fromkeys(done, 1)

    def _start_batch(self) -> None:
        length = len(self._waiting[0][1])
        batch = [entry for entry in self._waiting if len(entry[1]) == length]
        self._waiting = [entry for entry in self._waiting if len(entry[1]) != length]
        self._tokens, self._cache = torch.tensor([prompt for _, prompt, _ in batch]), None
        self._remaining = {id: output_tokens for id, _, output_tokens in batch}


def load(path: str, settings: dict[str, Any]) -> tuple[Transformers, str]:
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return Transformers(path, settings), f"transformers {transformers.__version__}, {threads}"


if __name__ == "__main__":
    serve(load)
