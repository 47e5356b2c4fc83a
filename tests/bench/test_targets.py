"""Engines in processes of their own, servers that the benchmark starts, and the command itself on a tiny model."""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rtp_llm.bench.catalogue import Catalogue, TargetName
from rtp_llm.bench.checkpoint import write_checkpoint
from rtp_llm.bench.cli import main
from rtp_llm.bench.peers import gguf_file, worker
from rtp_llm.bench.report import Report
from rtp_llm.bench.target import EngineTarget, ServerTarget, free_port, own_server
from rtp_llm.bench.worker_process import WorkerError, WorkerProcess
from rtp_llm.bench.workload import Request, Traffic
from rtp_llm.errors import ConfigError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    write_checkpoint(folder, "tiny")
    return folder


@dataclass
class CountingEngine:
    """Gives each request one token per step, two to those with an even id."""

    running: dict[int, int] = field(default_factory=dict)
    most: int = 0

    def add(self, id: int, prompt: list[int], output_tokens: int) -> None:
        self.running[id] = output_tokens
        self.most = max(self.most, len(self.running))

    def step(self) -> dict[int, int]:
        counts = {id: min(left, 2 - id % 2) for id, left in self.running.items()}
        self.running = {id: left - counts[id] for id, left in self.running.items() if left > counts[id]}
        return counts


def test_an_engine_gets_so_many_requests_at_a_time() -> None:
    engine = CountingEngine()
    requests = [{"prompt": [1, 2, 3], "output_tokens": 5} for _ in range(9)]
    records = worker.run(engine, requests, 4, [])
    assert engine.most == 4
    assert [(r.input_tokens, r.output_tokens) for r in records] == [(3, 5)] * 9
    assert [len(r.events) for r in records] == [3 if number % 2 == 0 else 5 for number in range(9)]
    assert all(r.ttft >= 0 and sorted(r.events) == r.events for r in records)


def test_an_engine_gets_requests_when_they_are_due() -> None:
    requests = [{"prompt": [1], "output_tokens": 1}] * 3
    records = worker.run(CountingEngine(), requests, 100, [0.0, 0.05, 0.1])
    assert [r.start for r in records] == [0.0, 0.05, 0.1]
    assert all(0 <= r.ttft < 10 for r in records)


def test_a_worker_that_ends_says_why() -> None:
    with WorkerProcess("rtp_llm.bench.peers.missing") as process, pytest.raises(WorkerError, match="No module named"):
        process.ask({})


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    server = ServerTarget("broken", command, free_port(), tmp_path / "log")
    with pytest.raises(WorkerError, match=r"broken ended with exit code 1(.|\n)*no such model"), server:
        pass


@pytest.mark.parametrize("text", ["ours-bf17", "nobody-bf16", "ours"])
def test_an_unknown_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: ours-bf16"):
        TargetName.parse(text)


def test_settings_follow_a_target() -> None:
    name = TargetName.parse("ours-w8a8@TP_SIZE=2+ITL_BUDGET_MS=50")
    assert (name.kind, name.precision, name.settings) == ("ours", "w8a8", {"TP_SIZE": "2", "ITL_BUDGET_MS": "50"})


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_gguf_file_has_the_weights_of_the_checkpoint(tmp_path: Path, family: str, type_name: str) -> None:
    write_checkpoint(tmp_path, "tiny")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": family}))
    if family == "llama":  # which has no biases; float32, so that numpy reads it
        names = {name: size for name, size in _shapes(tmp_path).items() if not name.endswith(".bias")}
        source = np.random.default_rng(0)
        weights = {name: source.standard_normal(size, np.float32) for name, size in names.items()}
        save_file(weights, tmp_path / "model.safetensors")
    gguf_file.convert(tmp_path, tmp_path / "model.gguf", type_name)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    expected = dict(gguf_file._read_tensors(tmp_path))
    assert len(tensors) == len(expected)
    close = partial(np.testing.assert_allclose, rtol=2**-7, atol=0.03 if type_name == "q8_0" else 1e-5)
    close(tensors["blk.1.ffn_down.weight"], expected["model.layers.1.mlp.down_proj.weight"])
    query = expected["model.layers.0.self_attn.q_proj.weight"]
    if family == "llama":  # neighbours rotate together: row 2i of a head is row i, row 2i + 1 is row i + half
        half = config["head_dim"] // 2
        order = [start + row + part * half for start in range(0, 128, 32) for row in range(half) for part in (0, 1)]
        query = query[order]
        assert load_file(tmp_path / "model.safetensors").keys() == expected.keys()
    close(tensors["blk.0.attn_q.weight"], query)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: weight.shape for name, weight in gguf_file._read_tensors(folder)}


def test_our_engine_generates_what_is_asked(checkpoint: Path) -> None:
    """The engine runs in a process of its own, with prompts of several lengths at once."""
    target = EngineTarget("offline-bf16", "offline", checkpoint, {"KV_CACHE_MEM_MB": "16", "RTP_THREADS": "1"})
    requests = [Request(list(range(10, 10 + length)), length // 2) for length in (4, 8, 40)]
    ended: list[int] = []
    with target:
        records = target.run(Traffic(requests, 2), lambda record: ended.append(record.output_tokens))
    assert [(r.input_tokens, r.output_tokens) for r in records] == [(4, 2), (8, 4), (40, 20)]
    assert ended == [2, 4, 20]
    assert target.start_seconds > 0
    assert "1 threads" in target.description


@pytest.mark.slow
def test_the_table_compares_our_server_with_what_is_installed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "ours-bf16@KV_CACHE_MEM_MB=64+RTP_THREADS=1,transformers-bf16,openvino-bf16"
    command = ["table", "--checkpoint", str(checkpoint), "--folder", str(tmp_path), "--targets", names]
    assert main([*command, "--cases", "c1,prefill", "--rounds", "2"]) == 0
    output = capsys.readouterr()
    report = Report.read(tmp_path / "report.json")
    ours, *others = report.targets
    assert ours.startswith("ours-bf16")
    assert "transformers-bf16" in others
    if "openvino-bf16" in report.absent:
        assert "openvino-bf16: absent: no package openvino_genai" in output.out
    for case in report.cases:
        for target in report.targets:
            runs = report.runs_of(case.name, target)
            assert [run.round for run in runs] == [0, 1]
            assert all(run.summary.errors == 0 and report.rate(case, target) > 0 for run in runs)
            assert all(run.bound and 0 < report.rate(case, target) < report.bound(case, target) for run in runs)
    order = [(run.case, run.round, run.target) for run in report.runs]
    assert order[:2] == [("c1", 0, ours), ("c1", 0, "transformers-bf16")]  # in turns
    assert "serves" not in (tmp_path / "ours-bf16.log").read_text().splitlines()[-1]  # it has ended


def test_weights_are_converted_once(checkpoint: Path, tmp_path: Path) -> None:
    catalogue = Catalogue(checkpoint, (sys.executable,), tmp_path)
    first = catalogue._gguf("f16")
    time = first.stat().st_mtime_ns
    assert catalogue._gguf("f16") == first
    assert first.stat().st_mtime_ns == time
    (checkpoint / "model.safetensors").touch()
    assert catalogue._gguf("f16").stat().st_mtime_ns > time


def test_errors_name_what_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--cases", "c3", "--folder", str(tmp_path)]) == 64
    assert main(["checkpoint", str(tmp_path), "--shape", "gpt-9"]) == 64
    assert main(["serve", "--url", "https://host", "--model", "x"]) == 64
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 64
    errors = capsys.readouterr().err.splitlines()
    assert [error.count("allowed") for error in errors[:3]] == [1, 1, 1], errors


def test_servers_that_have_not_started_yet_do_not_share_a_port(tmp_path: Path) -> None:
    servers = [own_server(name, tmp_path, tmp_path / name, {}) for name in ("ours-bf16", "ours-w8a8", "ours-int8")]
    assert len({server.endpoint.url for server in servers}) == 3


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("QUANTIZATION=int9", "QUANTIZATION='int9': not valid; allowed: one of INT8, W8A8, INT4"),
        ("ACT_TYPE=fp8", "ACT_TYPE='fp8': not valid; allowed: one of fp32, bf16, fp16"),
        ("QUANTIZATION=int8", "/nowhere"),  # as the server, which takes lower case too
    ],
)
def test_offline_validates_settings_as_the_server(setting: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["offline", "/nowhere", "--env", setting])
    assert error in capsys.readouterr().err
