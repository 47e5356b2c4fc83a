"""An independent judge: transformers on the same checkpoint gives the tokens and the logprobs that the API gives."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = [
    "The matrices",
    "Who decides what happens next? Only rank",
    'def step(batch):\n\treturn "naïve 数据 🚀"',
    "0",
]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    return loaded


def expected_logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[position, token]: how likely each token is behind the ids up to a position."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completion(
    prompt: str, http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same tokens, each with the same logprob and the same likeliest others."""
    ids = tokenizer(prompt)["input_ids"]
    body = {"prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "logprobs": 4}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    made = model.generate(  # type: ignore[operator]  # a method that the mixin adds
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    output = made[len(ids) :]
    assert choice["text"] == tokenizer.decode(output, skip_special_tokens=True)
    table = expected_logprobs(model, made)[len(ids) - 1 : -1]
    for place, token in enumerate(output):
        assert choice["logprobs"]["token_logprobs"][place] == pytest.approx(float(table[place, token]), abs=TOLERANCE)
        tops = choice["logprobs"]["top_logprobs"][place]
        values, ids_of_tops = (column.tolist() for column in table[place].topk(4))
        # By text, which several tokens may share: then the likeliest of them stands for all.
        expected: dict[str, float] = {}
        for value, other in zip(values, ids_of_tops, strict=True):
            expected.setdefault(_bytes(tokenizer, other).decode(errors="replace"), value)
        assert tops == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_logprobs(
    prompt: str, http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(prompt)["input_ids"]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    table = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert table["token_logprobs"][0] is None
    expected = expected_logprobs(model, ids)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert table["token_logprobs"][1:] == pytest.approx(expected, abs=TOLERANCE)


def test_chat(http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The template's own rendering, and the logprobs of a sampled answer: those of the model, before any
    temperature.
    """
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello 🚀"}]
    rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids = rendered["input_ids"]
    assert http.post("/tokenize", json={"messages": messages}).json()["token_ids"] == ids
    body = {
        "messages": messages,
        "max_tokens": 20,
        "seed": 1,
        "temperature": 0.8,
        "top_p": 0.9,
        "ignore_eos": True,
        "logprobs": True,
    }
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    entries = answer["choices"][0]["logprobs"]["content"]
    native = {"messages": messages, "random_seed": 1, "top_p": 0.9, "temperature": 0.8}
    config = {"max_new_tokens": 20, "ignore_eos": True, "return_output_ids": True}
    output = http.post("/", json={**native, "generate_config": config}).json()["output_ids"][0]
    assert [entry["bytes"] for entry in entries] == [list(_bytes(tokenizer, token)) for token in output]
    table = expected_logprobs(model, ids + output)[len(ids) - 1 : -1]
    expected = [float(table[place, token]) for place, token in enumerate(output)]
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected, abs=TOLERANCE)


def _bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """By the table that GPT-2 defined: printable bytes stand for themselves, the others for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(v): v for v in printable} | {chr(256 + i): v for i, v in enumerate(others)}
    text = str(tokenizer.convert_ids_to_tokens(token))
    if token in tokenizer.all_special_ids:
        return text.encode()
    return bytes(alphabet[character] for character in text)
