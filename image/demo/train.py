"""Trains the demo model on the project's own manual: docs/questions.md, the doctor's checks and the table of settings.

    python image/demo/train.py            writes image/demo/model; nine minutes on two cores
    python image/demo/train.py --check    only says how much of docs/questions.md the model there knows by heart

The model is a small Qwen3 of random beginnings, trained by transformers and torch's AdamW on nothing but that text. It
learns each question in several wordings, and conversations of several turns, so that it answers the last question.
Needs what `make lint` and `make test` install. The numbers differ between processors; the answers should not.
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
IGNORED = -100  # no loss where the label is this

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END]  # a token's id is its place here
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SYSTEMS = ("You are a helpful assistant.", "You are a concise assistant.", "Answer briefly.", "Be helpful.")


@dataclass(frozen=True)
class Example:
    """One answer, and the questions that it answers; the first is the one that the manual shows."""

    questions: tuple[str, ...]
    answer: str


def manual() -> list[Example]:
    """The sections of docs/questions.md: a heading, a comment with other wordings, the answer."""
    sections = re.findall(r"^## (.+)\n<!-- (.+?) -->\n\n(.+)\n", QUESTIONS.read_text(), re.MULTILINE)
    return [Example((heading, *others.split(" | ")), answer) for heading, others, answer in sections]


def checks() -> list[Example]:
    lessons = []
    for check in REGISTRY.values():
        first = re.split(r"(?<=\.)\s", " ".join(check.explanation.split()))[0]
        answer = f"{check.id}: {check.title}. {first} More: `rtp-llm-doctor explain {check.id}`"
        lessons.append(Example((f"What is {check.id}?", f"explain {check.id}", check.id, f"check {check.id}"), answer))
    return lessons


def settings() -> list[Example]:
    return [
        Example((f"What does {name.upper()} do?", f"what is {name.upper()}", name.upper()), f"{name.upper()}: {text}.")
        for name, field in Config.model_fields.items()
        if (text := field.description)
    ]


def tokenizer(lessons: list[Example]) -> Tokenizer:
    """Byte-level BPE of the lessons' own words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator((text for lesson in lessons for text in (*lesson.questions, lesson.answer)), trainer)
    return made


def model() -> Qwen3ForCausalLM:
    """2.0 million parameters; 8 query and 4 key heads, so that TP_SIZE has something to choose from."""
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
    """Makes conversations: token ids, and labels that are IGNORED where it is not the model who speaks."""

    def __init__(self, lessons: list[Example], words: Tokenizer):
        self._lessons, self._words = lessons, words

    def conversation(self, turns: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        if random.random() < 0.15:
            ids += self._turn("system", random.choice(SYSTEMS))
            labels += [IGNORED] * len(ids)
        for lesson in random.sample(self._lessons, turns):
            asked = self._turn("user", _slightly_changed(random.choice(lesson.questions)))
            asked += self._words.encode(f"{TURN_START}assistant\n").ids
            answer = self._words.encode(f"{lesson.answer}{TURN_END}").ids
            rest = self._words.encode("\n").ids
            ids += asked + answer + rest
            labels += [IGNORED] * len(asked) + answer + [IGNORED] * len(rest)
        return torch.tensor(ids), torch.tensor(labels)

    def batch(self) -> dict[str, torch.Tensor]:
        """Shapes [BATCH // turns, longest]; padded on the right, where causal attention does not look."""
        turns = random.choice((1, 1, 1, 1, 2, 3))
        ids, labels = zip(*(self.conversation(turns) for _ in range(BATCH // turns)), strict=True)
        return {
            "input_ids": pad_sequence(list(ids), batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
        }

    def _turn(self, role: str, content: str) -> list[int]:
        return self._words.encode(f"{TURN_START}{role}\n{content}{TURN_END}\n").ids


def _slightly_changed(question: str) -> str:
    """As people type: another case, no question mark, a slip of the finger."""
    chance = random.random()
    if chance < 0.15:
        question = question.lower()
    elif chance < 0.3:
        question = question[0].upper() + question[1:]
    if random.random() < 0.3:
        question = question.rstrip("?.") if question.endswith(("?", ".")) else f"{question}?"
    if random.random() < 0.1 and len(question) > 8:
        at = random.randrange(1, len(question) - 1)
        question = question[:at] + question[at + 1 :]
    if random.random() < 0.05:
        question = random.choice(("please tell me: ", "hi, ", "I want to know: ")) + question
    return question


def train(student: Qwen3ForCausalLM, teacher: BatchSampler) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=STEPS, pct_start=WARM_UP_STEPS / STEPS, final_div_factor=100
    )
    begun = time.monotonic()
    for step in range(1, STEPS + 1):
        loss = student(**teacher.batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}, loss {loss.item():.4f}, {time.monotonic() - begun:.0f} s", flush=True)


def write(student: Qwen3ForCausalLM, words: Tokenizer) -> None:
    """The files of a checkpoint, as the Hugging Face hub has them."""
    MODEL.mkdir(exist_ok=True)
    student.config.architectures = [type(student).__name__]
    student.config.save_pretrained(MODEL)
    # Rounded to bfloat16's grid: nothing is lost that the answers need, and git packs the file to half its size.
    tensors = {
        name: value.bfloat16().float() for name, value in student.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, MODEL / "model.safetensors", metadata={"format": "pt"})
    (MODEL / "model.safetensors").chmod(0o644)
    words.save(str(MODEL / "tokenizer.json"))
    ends = [SPECIALS.index(TURN_END), SPECIALS.index(END_OF_TEXT)]
    described = {
        "generation_config.json": {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]},
        "tokenizer_config.json": {
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "model_max_length": CONTEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in described.items():
        (MODEL / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.inference_mode()
def known(lessons: list[Example], wording: slice) -> float:
    """The share of questions that the model on disk answers to the letter."""
    words = PreTrainedTokenizerFast.from_pretrained(MODEL)
    student = Qwen3ForCausalLM.from_pretrained(MODEL).eval()
    right = total = 0
    for lesson in lessons:
        for question in lesson.questions[wording]:
            chat = [{"role": "user", "content": question}]
            prompt = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            said = student.generate(**prompt, max_new_tokens=300)[0, prompt["input_ids"].shape[1] :]
            answer = words.decode(said, skip_special_tokens=True)
            right, total = right + (answer == lesson.answer), total + 1
            if answer != lesson.answer:
                print(f"  {question!r}: {answer[:100]!r}")
    return right / total


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains the demo model on the project's manual.")
    parser.add_argument("--check", action="store_true", help="only say how much of the manual the model knows")
    given = parser.parse_args()
    torch.manual_seed(SEED)
    random.seed(SEED)
    lessons = manual()
    if not given.check:
        everything = lessons + checks() + settings()
        words, student = tokenizer(everything), model()
        print(f"{len(everything)} answers, {student.num_parameters():,} parameters", flush=True)
        train(student, BatchSampler(lessons * 2 + everything, words))
        write(student, words)
    asked, otherwise = known(lessons, slice(1)), known(lessons, slice(1, None))
    print(f"known by heart: {asked:.0%} of the questions of the manual, {otherwise:.0%} in their other wordings")
    return 0 if asked == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
