"""What grammars cost per step: `python -m tests.structured.benchmark --device cuda`.

Times the sampler of rank 0 on random logits of a large vocabulary, greedy, with and without a JSON schema for every
stream. A pause between steps stands for the forward pass, during which masks are computed.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.layers.sampler import Sampler
from rtp_llm.text import grammar
from tests.structured.random_text import Vocabulary
from tests.structured.schemas import SCHEMAS

END = "<|im_end|>"
STEPS, WARM_UP_STEPS = 150, 10


def write_vocabulary(directory: Path, size: int) -> None:
    """Writes a byte-level tokenizer of `size` tokens: letters and their random concatenations."""
    generator, alphabet = random.Random(0), sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet)
    while len(tokens) < size - 1:
        tokens["".join(generator.choices('etaoinshrdlucmfwypvbgk"}:,', k=generator.randint(2, 8)))] = None
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def make_requests(vocabulary: Vocabulary, streams: int, text_grammar: str) -> list[Request]:
    requests = [vocabulary.request(text_grammar or "start: /.*/", id=str(i), temperature=0.0) for i in range(streams)]
    for request in requests:
        if not text_grammar:
            request.matcher = None
    return requests


def step_times(vocabulary: Vocabulary, device: torch.device, requests: list[Request], pause: float) -> Iterator[float]:
    """Yields the seconds that the sampler takes per step."""
    sampler = Sampler(len(requests), vocabulary.size, device)
    for slot, request in enumerate(requests):
        sampler.reset(slot, request)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(STEPS):
        logits = torch.randn(len(requests), vocabulary.size, generator=generator, device=device)
        rows = SampledRows.build(range(len(requests)), [len(request.tokens) for request in requests])
        time.sleep(pause)
        started_at = time.perf_counter()
        sampled = sampler.accept_drafts(sampler.sample(logits, rows), rows)
        yield time.perf_counter() - started_at
        for slot, (request, tokens) in enumerate(zip(requests, sampled, strict=True)):
            request.tokens += tokens.token_ids
            if request.finish_reason(1 << 20):
                del request.tokens[request.num_prompt_tokens :]
                sampler.reset(slot, request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--pause-ms", type=float, default=10.0, help="stands for the forward pass")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        write_vocabulary(Path(directory), arguments.vocabulary)
        vocabulary = Vocabulary(Path(directory), num_padding_ids=0)
    medians = {}
    for name, text_grammar in (("none", ""), ("JSON schema", grammar.from_json_schema(SCHEMAS["people"]))):
        requests = make_requests(vocabulary, arguments.streams, text_grammar)
        times = list(step_times(vocabulary, torch.device(arguments.device), requests, arguments.pause_ms / 1000))
        medians[name] = median(times[WARM_UP_STEPS:])
        worst = sorted(times[WARM_UP_STEPS:])[-len(times) // 20]
        print(f"grammar {name}: {medians[name] * 1000:.2f} ms per step, 95 % within {worst * 1000:.2f} ms")
    added = medians["JSON schema"] - medians["none"]
    step = arguments.pause_ms / 1000 + medians["none"]
    print(f"added: {added * 1000:.2f} ms, {added / step:.1%} of a step of {step * 1000:.1f} ms")


if __name__ == "__main__":
    main()
