"""Trains the demo model on the project's own manual: docs/questions.md, the doctor's checks and the table of settings.

    python image/demo/train.py            writes image/demo/model; nine minutes on two cores
    python image/demo/train.py --check    only measures the exact-match accuracy of that model on docs/questions.md

The model is a small Qwen3, trained from random weights on that text only, with transformers and torch's AdamW. The
examples have several wordings per question, and conversations of several turns, so that it learns to answer the last
question. Needs what `make lint` and `make test` install. The weights differ between processors; the answers should not.
"""

import argparse
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from doctor import checks as registered  # noqa: F401  # fills the registry
from doctor.check import REGISTRY
from rtp_llm.config import Config

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE.parents[1] / "docs" / "questions.md"
MODEL = HERE / "model"

SEED = 20
STEPS, BATCH, PEAK_RATE, WARM_UP_STEPS = 1000, 16, 3e-3, 60  # BATCH: questions per step
VOCAB, CONTEXT = 1024, 2048
IGNORED = -100  # label without loss: torch cross_entropy's ignore_index

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END]  # a token's id is its index here
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SYSTEMS = ("You are a helpful assistant.", "You are a concise assistant.", "Answer briefly.", "Be helpful.")


@dataclass(frozen=True)
class Example:
    """One answer, and the questions that have this answer. The first of them is the main wording."""

    questions: tuple[str, ...]
    answer: str


def manual() -> list[Example]:
    """Returns one example per section of docs/questions.md: heading, other wordings (an HTML comment) and answer."""
    sections = re.findall(r"^## (.+)\n<!-- (.+?) -->\n\n(.+)\n", QUESTIONS.read_text(), re.MULTILINE)
    return [Example((heading, *others.split(" | ")), answer) for heading, others, answer in sections]


def check_examples() -> list[Example]:
    """Returns one example per doctor check; the answer is its id, title and first sentence of the explanation."""
    examples = []
    for check in REGISTRY.values():
        sentence = re.split(r"(?<=\.)\s", " ".join(check.explanation.split()))[0]
        answer = f"{check.id}: {check.title}. {sentence} More: `rtp-llm-doctor explain {check.id}`"
        examples.append(Example((f"What is {check.id}?", f"explain {check.id}", check.id, f"check {check.id}"), answer))
    return examples


def setting_examples() -> list[Example]:
    """Returns one example per documented setting; the answer is its description.

    Leaves out questions that docs/questions.md answers.
    """
    in_manual = {_normalized(question) for example in manual() for question in example.questions}
    examples = []
    for name, field in Config.model_fields.items():
        wordings = (f"What does {name.upper()} do?", f"what is {name.upper()}", name.upper())
        questions = tuple(question for question in wordings if _normalized(question) not in in_manual)
        if field.description:
            examples.append(Example(questions, f"{name.upper()}: {field.description}."))
    return examples


def _normalized(question: str) -> str:
    return question.lower().rstrip("?")


def train_tokenizer(examples: list[Example]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer trained on the examples' text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    texts = (text for example in examples for text in (*example.questions, example.answer))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_model() -> Qwen3ForCausalLM:
    """Returns a model of 2.0 million parameters. 8 query heads and 4 key heads allow several values of TP_SIZE."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=SPECIALS.index(END_OF_TEXT),
            eos_token_id=SPECIALS.index(TURN_END),
            pad_token_id=SPECIALS.index(END_OF_TEXT),
            dtype="float32",
        )
    )


class BatchSampler:
    """Samples batches of random conversations."""

    def __init__(self, examples: list[Example], tokenizer: Tokenizer):
        self._examples, self._tokenizer = examples, tokenizer

    def conversation(self, turns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the token ids of a random conversation and its labels: the same ids in answers, IGNORED elsewhere."""
        ids: list[int] = []
        labels: list[int] = []
        if random.random() < 0.15:
            ids += self._turn("system", random.choice(SYSTEMS))
            labels += [IGNORED] * len(ids)
        for example in random.sample(self._examples, turns):
            prompt = self._turn("user", _vary(random.choice(example.questions)))
            prompt += self._tokenizer.encode(f"{TURN_START}assistant\n").ids
            answer = self._tokenizer.encode(f"{example.answer}{TURN_END}").ids
            newline = self._tokenizer.encode("\n").ids
            ids += prompt + answer + newline
            labels += [IGNORED] * len(prompt) + answer + [IGNORED] * len(newline)
        return torch.tensor(ids), torch.tensor(labels)

    def batch(self) -> dict[str, torch.Tensor]:
        """Returns token ids and labels, both [number of conversations, length of the longest conversation].

        All conversations have the same random number of turns, and BATCH questions in total. Shorter ones are padded
        on the right, which causal attention ignores.
        """
        turns = random.choice((1, 1, 1, 1, 2, 3))
        ids, labels = zip(*(self.conversation(turns) for _ in range(BATCH // turns)), strict=True)
        return {
            "input_ids": pad_sequence(list(ids), batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
        }

    def _turn(self, role: str, content: str) -> list[int]:
        return self._tokenizer.encode(f"{TURN_START}{role}\n{content}{TURN_END}\n").ids


def _vary(question: str) -> str:
    """Changes the question as users do: letter case, missing question mark, a typo, a polite prefix."""
    case = random.random()
    if case < 0.15:
        question = question.lower()
    elif case < 0.3:
        question = question[0].upper() + question[1:]
    if random.random() < 0.3:
        question = question.rstrip("?.") if question.endswith(("?", ".")) else f"{question}?"
    if random.random() < 0.1 and len(question) > 8:
        index = random.randrange(1, len(question) - 1)
        question = question[:index] + question[index + 1 :]
    if random.random() < 0.05:
        question = random.choice(("please tell me: ", "hi, ", "I want to know: ")) + question
    return question


def train(model: Qwen3ForCausalLM, sampler: BatchSampler) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=STEPS, pct_start=WARM_UP_STEPS / STEPS, final_div_factor=100
    )
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        loss = model(**sampler.batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    """Writes model and tokenizer to the directory MODEL, in the Hugging Face format."""
    MODEL.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(MODEL)
    # fp32 values rounded to bfloat16: exact enough for the answers, and git compresses the file to half its size.
    tensors = {name: value.bfloat16().float() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, MODEL / "model.safetensors", metadata={"format": "pt"})
    (MODEL / "model.safetensors").chmod(0o644)
    tokenizer.save(str(MODEL / "tokenizer.json"))
    eos_ids = [SPECIALS.index(TURN_END), SPECIALS.index(END_OF_TEXT)]
    configs = {
        "generation_config.json": {"do_sample": False, "eos_token_id": eos_ids, "pad_token_id": eos_ids[1]},
        "tokenizer_config.json": {
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "model_max_length": CONTEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in configs.items():
        (MODEL / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.inference_mode()
def exact_match(examples: list[Example], wordings: slice) -> float:
    """Returns the fraction of the questions that the model in MODEL answers exactly, and prints the others.

    `wordings`: indices of the questions that each example contributes.
    """
    hf_tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = Qwen3ForCausalLM.from_pretrained(MODEL).eval()
    num_exact = total = 0
    for example in examples:
        for question in example.questions[wordings]:
            chat = [{"role": "user", "content": question}]
            prompt = hf_tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output_ids = model.generate(**prompt, max_new_tokens=300)[0, prompt["input_ids"].shape[1] :]
            answer = hf_tokenizer.decode(output_ids, skip_special_tokens=True)
            num_exact, total = num_exact + (answer == example.answer), total + 1
            if answer != example.answer:
                print(f"  {question!r}: {answer[:100]!r}")
    return num_exact / total


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains the demo model on the project's manual.")
    parser.add_argument("--check", action="store_true", help="only measure the accuracy of the existing model")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    random.seed(SEED)
    manual_examples = manual()
    if not args.check:
        examples = manual_examples + check_examples() + setting_examples()
        tokenizer, model = train_tokenizer(examples), make_model()
        print(f"{len(examples)} answers, {model.num_parameters():,} parameters", flush=True)
        train(model, BatchSampler(manual_examples * 2 + examples, tokenizer))
        save_checkpoint(model, tokenizer)
    headings, others = exact_match(manual_examples, slice(1)), exact_match(manual_examples, slice(1, None))
    print(f"exact answers: {headings:.0%} of the manual's questions, {others:.0%} of their other wordings")
    return 0 if headings == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
