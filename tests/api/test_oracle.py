"""The API's tokens and logprobs equal those of transformers, the oracle, for the same checkpoint."""

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
    """Returns logprobs [position, token]: those that the model predicts for the token after ids[: position + 1]."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completion(
    prompt: str, http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A greedy completion has the tokens, logprobs and top logprobs of transformers."""
    ids = tokenizer(prompt)["input_ids"]
    body = {"prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "logprobs": 4}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    token_ids = model.generate(  # type: ignore[operator]  # a method that the mixin adds
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    output = token_ids[len(ids) :]
    assert choice["text"] == tokenizer.decode(output, skip_special_tokens=True)
    logprobs = expected_logprobs(model, token_ids)[len(ids) - 1 : -1]
    for position, token in enumerate(output):
        assert choice["logprobs"]["token_logprobs"][position] == pytest.approx(
            float(logprobs[position, token]), abs=TOLERANCE
        )
        tops = choice["logprobs"]["top_logprobs"][position]
        values, ids_of_tops = (column.tolist() for column in logprobs[position].topk(4))
        # The keys are texts. If several tokens have the same text, the likeliest one counts.
        expected: dict[str, float] = {}
        for value, token_id in zip(values, ids_of_tops, strict=True):
            expected.setdefault(_bytes(tokenizer, token_id).decode(errors="replace"), value)
        assert tops == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_logprobs(
    prompt: str, http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(prompt)["input_ids"]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    expected = expected_logprobs(model, ids)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_prompt_logprobs_in_vllms_form(
    logprobs: int | None, http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each token of the prompt with its logprob and rank, and the likeliest ones, on both endpoints."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 3, "logprobs": logprobs}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    _check_prompt_logprobs(choice["prompt_logprobs"], ids, 3, model, tokenizer)
    if logprobs:
        assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"]), "of the answer, not of the prompt"
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"messages": messages, "max_tokens": 1, "prompt_logprobs": 0, "logprobs": bool(logprobs)}
    answer = http.post("/v1/chat/completions", json=chat).json()
    ids = http.post("/tokenize", json={"messages": messages}).json()["token_ids"]
    _check_prompt_logprobs(answer["prompt_logprobs"], ids, 0, model, tokenizer)
    assert "prompt_logprobs" not in http.post("/v1/chat/completions", json=chat | {"prompt_logprobs": None}).json()


def _check_prompt_logprobs(
    rows: list[Any], ids: list[int], num_tops: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(rows) == len(ids)
    assert rows[0] is None
    logprobs = expected_logprobs(model, ids)
    for token, row, expected in zip(ids[1:], rows[1:], logprobs, strict=False):
        order = expected.argsort(descending=True).tolist()
        assert row.keys() == {str(token), *map(str, order[:num_tops])}
        for key, entry in row.items():
            assert entry["logprob"] == pytest.approx(float(expected[int(key)]), abs=TOLERANCE)
            assert entry["rank"] == order.index(int(key)) + 1
            assert entry["decoded_token"] == _bytes(tokenizer, int(key)).decode(errors="replace")


def test_chat(http: httpx.Client, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The rendered prompt of a chat equals that of transformers. Its logprobs do not depend on the temperature."""
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
    response = http.post("/v1/chat/completions", json=body).json()
    assert response["usage"]["prompt_tokens"] == len(ids)
    entries = response["choices"][0]["logprobs"]["content"]
    native = {"messages": messages, "random_seed": 1, "top_p": 0.9, "temperature": 0.8}
    config = {"max_new_tokens": 20, "ignore_eos": True, "return_output_ids": True}
    output = http.post("/", json={**native, "generate_config": config}).json()["output_ids"][0]
    assert [entry["bytes"] for entry in entries] == [list(_bytes(tokenizer, token)) for token in output]
    logprobs = expected_logprobs(model, ids + output)[len(ids) - 1 : -1]
    expected = [float(logprobs[position, token]) for position, token in enumerate(output)]
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected, abs=TOLERANCE)


def _bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Returns a token's bytes by GPT-2's table: printable bytes map to themselves, the others to U+0100 and above."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [value for value in range(256) if value not in printable]
    alphabet = {chr(v): v for v in printable} | {chr(256 + i): v for i, v in enumerate(unprintable)}
    text = str(tokenizer.convert_ids_to_tokens(token))
    if token in tokenizer.all_special_ids:
        return text.encode()
    return bytes(alphabet[character] for character in text)
