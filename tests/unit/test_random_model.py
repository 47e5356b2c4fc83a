"""The random checkpoint of the tests: identical bytes on all machines, and usable with Hugging Face libraries."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import random_model

TEXT = 'Shared memory, 1234 GPUs: "naïve" 数据 🚀\n\tdef step(): pass'

# Pinned, so that a library version that writes other bytes is noticed here and not in a gang.
DIGESTS = {
    "model.safetensors": "2cf2f4d2b482cee79248d73a41f3387579a2d4d10b57e69715d9a2d9f67d3f8b",
    "tokenizer.json": "0f23e49ca7a0299e4924391472e1ccdcbd6cb3b38b83f66a6c178606b5599040",
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.random_model", *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "checkpoint"
    random_model.write(directory)
    return directory


def test_files_have_the_pinned_digests(checkpoint: Path) -> None:
    written = contents(checkpoint)
    assert {name: hashlib.sha256(written[name]).hexdigest() for name in DIGESTS} == DIGESTS
    assert sorted(written) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "7"}],
    ids=["one thread", "many threads"],
)
def test_another_process_writes_the_same_bytes(checkpoint: Path, tmp_path: Path, variables: Mapping[str, str]) -> None:
    process = run(str(tmp_path / "again"), **variables)
    assert (process.returncode, process.stderr) == (0, "")
    assert contents(tmp_path / "again") == contents(checkpoint)


def test_seed_changes_only_weights_and_config(checkpoint: Path, tmp_path: Path) -> None:
    random_model.write(tmp_path / "other", seed=1)
    first, second = contents(checkpoint), contents(tmp_path / "other")
    assert {name for name in first if first[name] != second[name]} == {"config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:  # the type annotations of transformers lack this return value
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report  # no tensor is missing, unused or of another shape
    return loaded


def test_transformers_generates_with_it(checkpoint: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("A GPU answers the second question well.", return_tensors="pt")
    first, second = (model.generate(**prompt, max_new_tokens=16, min_new_tokens=16) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[1] == prompt["input_ids"].shape[1] + 16
    assert len(set(first[0, -16:].tolist())) > 4  # does not repeat one token


@torch.inference_mode()
def test_first_token_affects_the_end_of_the_sequence(model: Any) -> None:
    """The first token affects the last one. Otherwise tests that compare output with and without prefix cache could not
    fail."""
    prompts = torch.randint(3, random_model.VOCAB, (32, 64), generator=torch.Generator().manual_seed(0))
    changed = prompts.clone()
    changed[:, 0] = 3 + (prompts[:, 0] - 2) % (random_model.VOCAB - 3)
    original_tokens, changed_tokens = (model(batch).logits[:, -1].argmax(-1) for batch in (prompts, changed))
    assert (original_tokens != changed_tokens).float().mean() > 0.3


def test_transformers_and_tokenizers_agree_on_the_tokenizer(checkpoint: Path) -> None:
    tokenizer, hf_tokenizer = (
        Tokenizer.from_file(str(checkpoint / "tokenizer.json")),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    assert hf_tokenizer(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
    assert hf_tokenizer.decode(tokenizer.encode(TEXT).ids) == tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert len(hf_tokenizer) == tokenizer.get_vocab_size() == random_model.VOCAB


def test_special_tokens_match_the_configs(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_bytes())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.pad_token_id == config["bos_token_id"]


def test_chat_template_is_chatml(checkpoint: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 2
