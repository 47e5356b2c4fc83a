"""A small checkpoint with random weights in Hugging Face format, written in a second, for tests.

Every part of a gang must have the same model, so the same seed gives the same bytes on all machines: the weights are
computed from raw 64-bit words with exact float32 arithmetic, not with a library's normal distribution, and the
tokenizer is trained on the text in this file. The output head has a large gain: the logit of the best token leads by
more than a different order of summation can change, so greedy output is the same for all batch and TP sizes.

    python -m tests.random_model FOLDER [--seed N]
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS = 4
HIDDEN = 128
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 32
INTERMEDIATE = 384
VOCAB = 1024
CONTEXT = 2048

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END]  # in order of token id

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

CORPUS = """\
A large language model is a long list of matrices. To write one word it multiplies them all, one layer after the other,
with the numbers that stand for the words so far. Whoever serves such a model asks two questions. Do the matrices fit
into the memory of this machine? And how often in a second can that memory be read from its first byte to its last?

A GPU answers the second question well. Its memory stands next to the processor and is read at thousands of gigabytes
per second, ten or twenty times what the memory of an ordinary server gives. It answers the first question less well:
one GPU holds some tens of gigabytes, and a good model needs hundreds. So the model is cut into pieces, and several GPUs
hold one piece each. That is tensor parallelism. Every matrix is cut by its columns or by its rows. Each rank multiplies
with its own slice; then all ranks add what they have, and everyone knows the sum. Two sums per layer are enough, one
after attention and one after the feed-forward network, if the first matrix of each pair is cut by columns and the
second by rows. Nothing else has to travel.

The adding is called all-reduce. Between GPUs of one machine it runs over fast links; between machines it runs over the
network, and there it is slow enough to notice. On a machine without any GPU the ranks are processes, and they meet in
shared memory: each one writes its part into a block that all the others have mapped too, waits until every flag is set,
and reads the parts of the others. No byte passes through the kernel on the way. A container gets only 64 megabytes of
shared memory if nobody asks for more, and that is the first thing to look at when a start fails with a bus error.

Who decides what happens next? Only rank 0. It keeps the queue of requests, chooses which tokens this step computes, and
sends one small message to all the others: token ids, positions, slots in the cache, lengths, and how to sample. The
others obey. If they had to agree by talking, they would talk more than they compute. If a rank is lost, its socket
closes, and everybody knows it at once; the rest keep their weights, wait until the supervisor has restarted the lost
one, and continue. The client sees a pause, not an error.

Attention looks back at everything that was said before. For each old token it needs a key and a value, and computing
them again would be a waste, so they are kept: this is the cache. It is divided into blocks of equal size, as the memory
of a computer is divided into pages, and a table says for each request which blocks are its own. When two requests begin
with the same words, they share the blocks of that beginning. A block is free when nobody refers to it any longer, and
the one that was not used for the longest time is taken first. When no block is left, the youngest request gives its
blocks back and will be computed again later. That is better than running out of memory in the middle of a sentence.

A prompt is read in chunks. While one request reads a long prompt, the others still want their next word, so a step has
a budget of tokens: first one token for each request that is already writing, then as much of the waiting prompts as
fits. Neither has to stand still for the other. This is called continuous batching, and it is why thirty people can use
one model at nearly the price of one: the matrices are read once per step, whether one token or thirty go through them.

The words themselves are not letters and not quite words. A tokenizer begins with the 256 possible bytes and learns
which neighbours stand together most often: first "t" and "h", then "th" and "e", then " the". A frequent word becomes a
single token; a rare one is spelled in pieces; nothing is unknown. On the way back a piece may end in the middle of a
character, as in "naïve", "straße" or "数据", and then the stream waits for the next piece before it shows anything.

At the end the model gives a score for every token that it knows. The highest score wins if the temperature is 0.
Otherwise the scores become chances, the unlikely tail is cut off, and a random number chooses. That number depends on
the seed and on the position only, so the same request gives the same answer, today, tomorrow, and after a restart.

What can go wrong? The driver is older than the library. The file is not complete. The port is taken. A firewall drops
the packets between two machines, and nobody says so. One part was started with another model, or with the same model
and another version. The address of a host points back to itself. The clock of one machine is wrong. The disk is full.
Each of these can be asked before anything heavy starts, and each answer should say what to type next. An error that
says "something failed" helps nobody; an error that says which variable, which value and what is allowed helps at once.

Measure before you change anything: 1 request, 8 requests, 32 requests; 128 tokens in, 128 tokens out; the time until
the first token, the time between two tokens, and how many tokens per second the whole machine gives. def step(batch):
return sample(model(batch)) # that is all. {"model": "demo", "stream": true, "max_tokens": 64} Thank you, and hello!
"""


def make_config(seed: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": SPECIALS.index(END_OF_TEXT),
        "eos_token_id": SPECIALS.index(TURN_END),
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "model_type": "qwen3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
        "seed": seed,
    }


def make_generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": SPECIALS.index(END_OF_TEXT),
        "do_sample": False,
        "eos_token_id": [SPECIALS.index(TURN_END), SPECIALS.index(END_OF_TEXT)],
        "pad_token_id": SPECIALS.index(END_OF_TEXT),
    }


def make_tokenizer_config() -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": CONTEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def make_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE tokenizer. Ties are broken by token id, so threads and hash seeds have no effect."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def matrix_shapes() -> Iterator[tuple[str, tuple[int, int], float]]:
    """Yields name, shape and gain (standard deviation of the output over that of the input) of each matrix."""
    yield "model.embed_tokens", (VOCAB, HIDDEN), math.sqrt(HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN), 1.0
        yield f"{prefix}.self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN), 1.0
        yield f"{prefix}.self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN), 1.0
        yield f"{prefix}.self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM), 1.0
        yield f"{prefix}.mlp.gate_proj", (INTERMEDIATE, HIDDEN), 1.0
        yield f"{prefix}.mlp.up_proj", (INTERMEDIATE, HIDDEN), 1.0
        yield f"{prefix}.mlp.down_proj", (HIDDEN, INTERMEDIATE), 0.5
    yield "lm_head", (VOCAB, HIDDEN), 3.0


def norm_shapes() -> Iterator[tuple[str, int, float]]:
    """Yields name, size and mean of each norm.

    Query and key norms are large, because with uniform attention a wrong KV cache would hardly change the output.
    """
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm", HIDDEN, 1.0
        yield f"{prefix}.self_attn.q_norm", HEAD_DIM, 1.5
        yield f"{prefix}.self_attn.k_norm", HEAD_DIM, 1.5
        yield f"{prefix}.post_attention_layernorm", HIDDEN, 1.0
    yield "model.norm", HIDDEN, 1.0


def uniform(source: np.random.BitGenerator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns float32 numbers in [-1, 1) from the upper 24 bits of each word; exact, so equal on all machines."""
    words: NDArray[np.uint64] = source.random_raw(math.prod(shape))
    return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)).reshape(shape)


def make_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    source = np.random.PCG64(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape, gain in matrix_shapes():
        scale = gain * math.sqrt(3 / shape[1])  # a uniform number in [-1, 1) has variance 1/3
        tensors[f"{name}.weight"] = uniform(source, shape) * np.float32(scale)
    for name, size, mean in norm_shapes():  # random, so that a missing norm changes the output
        tensors[f"{name}.weight"] = uniform(source, (size,)) * np.float32(0.25) + np.float32(mean)
    return tensors


def make_files(seed: int) -> dict[str, bytes]:
    """Returns the contents of the checkpoint by file name."""
    json_files = {
        "config.json": make_config(seed),
        "generation_config.json": make_generation_config(),
        "tokenizer_config.json": make_tokenizer_config(),
    }
    contents = {name: f"{json.dumps(content, indent=2)}\n".encode() for name, content in json_files.items()}
    contents["tokenizer.json"] = make_tokenizer().to_str(pretty=True).encode()
    contents["model.safetensors"] = save(make_weights(seed), metadata={"format": "pt"})
    return contents


def write(directory: Path, seed: int = 0) -> None:
    """Writes the checkpoint into the directory, and creates it if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in make_files(seed).items():
        (directory / name).write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.random_model", description="Writes a checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    args = parser.parse_args()
    write(args.folder, args.seed)
