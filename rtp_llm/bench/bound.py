"""The bound: the speed that no server can exceed, from the model's bytes and FLOPs and the machine's measured rates.

Counts the unavoidable work: reading all weights once per step, reading the keys and values of a context once per token
generated from it, and computing every product at the rate of a large one. Norms, sampling and HTTP count as zero.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rtp_llm.bench.worker_process import WorkerProcess
from rtp_llm.bench.workload import Workload
from rtp_llm.config import Config
from rtp_llm.machine.devices import usable_cores
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.footprint import head_weights, kv_bytes_per_token, layer_weights
from rtp_llm.model.spec import ModelSpec


@dataclass(frozen=True)
class Precision:
    """How weights are stored and multiplied.

    bits, head_bits: bits of each weight of the layers and of the output head, including quantization scales.
    dtype: data type in which weights and activations are multiplied.
    """

    bits: float
    dtype: str
    head_bits: float = 0.0  # 0: as `bits`


PRECISIONS = {
    "fp32": Precision(32, "fp32"),
    "bf16": Precision(16, "bf16"),
    "fp16": Precision(16, "bf16"),
    "int8": Precision(8, "bf16"),  # weights only
    "w8a8": Precision(8, "int8"),
    "q8_0": Precision(8.5, "int8"),
    "int4": Precision(4.5, "int8", head_bits=8),
    "q4_0": Precision(4.5, "int8"),
}


@dataclass(frozen=True)
class MachineRates:
    """Rates of the machine, measured with all cores, per second.

    bandwidth: bytes read from memory. operations: additions and multiplications in matrix products, by data type.
    """

    bandwidth: float
    operations: dict[str, float]


class Probe(WorkerProcess):
    """A child process that measures the machine's rates, bytes read from memory and operations per second, in two
    seconds per call of `measure`. As a context manager, ends the process on exit.
    """

    def __init__(self) -> None:
        super().__init__("rtp_llm.bench.probe", str(usable_cores()))

    def measure(self) -> MachineRates:
        return MachineRates(**self.ask({}))


@dataclass(frozen=True)
class ModelCost:
    """The numbers of a model that determine the minimum duration of a forward pass (a step).

    A step reads all weights once. It multiplies the weights of the output head (`head_weights`) only for the tokens
    after which an output token is sampled.
    """

    layer_weights: int
    head_weights: int
    kv_bytes: int  # per token of a context
    flops_per_key: int  # of a token that attends to it
    precision: Precision

    @classmethod
    def of(cls, checkpoint: Path, precision: Precision) -> "ModelCost":
        """Returns the cost of the model in a checkpoint whose weights have this precision, from its config.json.

        Raises CheckpointError or ConfigError if config.json or the header of a safetensors file is invalid or
        unsupported.
        """
        spec = read_spec(checkpoint)
        return cls(
            layer_weights(spec, 1),
            head_weights(spec, 1),
            kv_bytes_per_token(spec, 1),
            4 * spec.num_layers * spec.num_heads * spec.head_dim,
            precision,
        )

    def read_seconds(self, rates: MachineRates, concurrency: int, context: float) -> float:
        """Returns the minimum time in seconds to read the weights and the KV cache for a step of `concurrency`
        sequences.

        context: tokens of each sequence in the KV cache.
        """
        precision = self.precision
        bits = self.layer_weights * precision.bits + self.head_weights * (precision.head_bits or precision.bits)
        return (bits / 8 + self.kv_bytes * concurrency * context) / rates.bandwidth

    def compute_seconds(self, rates: MachineRates, tokens: int, sampled: int, keys: float) -> float:
        """Returns the minimum time in seconds to compute `tokens` tokens.

        sampled: number of these tokens after which an output token is sampled. keys: number of keys that the tokens
        attend to, summed over the tokens.
        """
        operations = 2 * (self.layer_weights * tokens + self.head_weights * sampled)
        attention = self.flops_per_key * keys / rates.operations["bf16"]
        return operations / rates.operations[self.precision.dtype] + attention


@dataclass(frozen=True)
class Bound:
    """Upper bounds of the rates in a `summary.Summary`, in tokens per second: what the machine's memory bandwidth and
    arithmetic allow.
    """

    output_rate: float
    input_rate: float
    decode_rate: float

    @classmethod
    def of(cls, cost: ModelCost, rates: MachineRates, workload: Workload, concurrency: int) -> "Bound":
        """Returns the highest token rates for a workload on a machine with the measured `rates` (bytes and operations
        per second). `concurrency`: number of concurrent requests.

        If requests run one at a time, prefill and decoding follow each other, so their times add up. Concurrent
        requests overlap: the bound is the longer of the time to read all bytes and the time for all operations.
        """
        lengths = [(inputs - workload.shared_prefix, inputs, outputs) for inputs, outputs in workload.lengths]
        context = fmean(inputs + outputs / 2 for _, inputs, outputs in lengths)
        steps = fmean(outputs - 1 for _, _, outputs in lengths)
        prefill = fmean(cost.compute_seconds(rates, new, 1, new * (inputs - new / 2)) for new, inputs, _ in lengths)
        read = cost.read_seconds(rates, concurrency, context)
        compute = cost.compute_seconds(rates, concurrency, concurrency, concurrency * context)
        per_request = steps / concurrency
        together = max(per_request * read, prefill + per_request * compute)
        alone = prefill + steps * max(read, compute)
        return cls(
            output_rate=(steps + 1) / (alone if concurrency == 1 else together),
            input_rate=fmean(inputs for _, inputs, _ in lengths) / prefill,
            decode_rate=1 / max(read, compute),
        )


def read_spec(checkpoint: Path) -> ModelSpec:
    """Returns the architecture of the model in a checkpoint, from its config.json.

    Raises CheckpointError or ConfigError if config.json or the header of a safetensors file is invalid or unsupported.
    """
    config = Config.model_validate({"checkpoint_path": str(checkpoint)})
    return Checkpoint.open(config).spec(config)


def machine() -> dict[str, object]:
    """Returns the machine's description for a report: CPU model, CPU flags that matter for speed, usable cores, memory
    in GiB, version of the Linux kernel.
    """
    fields = dict(_cpuinfo())
    wanted = (
        *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_bf16", "amx_int8", "bf16"),
    )
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", os.uname().machine),
        "flags": [flag for flag in wanted if flag in flags],
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": os.uname().release,
    }


def _cpuinfo() -> list[tuple[str, str]]:
    """Returns keys and values of the first processor in /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in first.splitlines())]
