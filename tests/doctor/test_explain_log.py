"""explain-log names the checks for the symptoms in a log, and no others.

`logs/` holds logs of failed and of healthy starts, as NCCL, CUDA, torch, container runtimes and this server print them.
"""

from pathlib import Path

import pytest

from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY, Symptom
from doctor.explain import EXIT_CODES, KILLED, KILLED_TEXT, find_symptoms
from rtp_llm.errors import ExitCode
from tests.doctor.fixtures import doctor

LOGS = Path(__file__).parent / "logs"
SYMPTOMS = [(check.id, symptom) for check in REGISTRY.values() for symptom in check.symptoms]
# Text that "…" may match.
FILLINGS = ("3", "/dev/shm/nccl-jX2kQa", "10.0.0.5:29500", "node-a and node-b (rank 7): 0x7f")
# The check ids of each log.
EXPECTED_IDS: dict[str, set[str]] = {
    "bus-error-exit-135": {"S-01"},
    "bus-error-python": {"S-01"},
    "bus-error-torchrun": {"S-01"},
    "bus-error-ucx": {"S-01"},
    "nccl-shm": {"S-01"},
    "nccl-shm-denied": {"S-03"},
    "nccl-attach": {"S-05"},
    "cuda-802": {"G-04"},
    "cuda-803": {"G-05"},
    "cuda-804": {"G-06"},
    "cuda-oom": {"G-14", "M-03"},
    "xid-79": {"G-16"},
    "xid-480": set(),
    "safetensors-cut": {"M-04"},
    "safetensors-lfs": {"M-05"},
    "port-taken": {"N-08"},
    "port-taken-uvicorn": {"N-08"},
    "nccl-connect": {"N-02"},
    "nccl-connect-old": {"N-02"},
    "nccl-docker0": {"N-03"},
    "nccl-no-interface": {"N-06"},
    "nccl-duplicate-gpu": {"G-10"},
    "gloo-loopback": {"N-04"},
    "gloo-name": {"N-05"},
    "oom-docker": {"L-05"},
    "oom-kernel": {"L-05"},
    "oom-kubernetes": {"L-05"},
    "getpwuid": {"L-10"},
    "threads": {"L-03"},
    "threads-denied": {"L-04"},
    "torch-connect-timeout": {"N-01"},
    "torch-names": {"N-07"},
    "torch-rendezvous-timeout": {"C-01", "C-09"},
    "torch-watchdog-first": {"P-01", "X-01"},
    "torch-watchdog-later": {"X-01"},
    "service-links": {"M-14", "N-15"},
    "server-64-setting": {"M-14"},
    "server-64-hub-name": {"M-08"},
    "server-64-rank": {"C-01"},
    "server-64-port": {"N-08"},
    "server-64-bare": {"M-14", "C-01", "C-02", "M-08"},
    "server-65-lfs": {"M-05"},
    "server-65-cut": {"M-04"},
    "server-65-shard": {"M-06"},
    "server-65-tokenizer": {"M-07"},
    "server-69-absent": {"C-09"},
    "server-69-disagree": {"C-09", "N-01", "C-01", "C-02"},
    "server-70-killed": {"L-05"},
    "server-71-bare": {"N-01", "N-02", "N-03"},
    "server-71-shm": {"S-01"},
    "server-slip": {"M-13"},
    "server-waiting": {"C-09", "N-01"},
    "healthy": set(),
    "healthy-waited": set(),
    "other-servers": set(),
}


def check_ids(text: str) -> set[str]:
    return {match.check.id for match in find_symptoms(text)}


@pytest.mark.parametrize("name", EXPECTED_IDS)
def test_a_log_names_these_checks_and_no_others(name: str) -> None:
    assert check_ids((LOGS / f"{name}.log").read_text()) == EXPECTED_IDS[name]


def test_every_log_has_a_test() -> None:
    assert {path.stem for path in LOGS.iterdir()} == EXPECTED_IDS.keys()


@pytest.mark.parametrize(("id", "symptom"), SYMPTOMS, ids=[f"{id}-{n}" for n, (id, _) in enumerate(SYMPTOMS)])
def test_every_symptom_finds_its_check(id: str, symptom: Symptom) -> None:
    for filling in FILLINGS:
        message = symptom.text.replace("…", filling)
        for line in (
            message,
            f"  {message}",
            f"[rank1]:[E302 10:31:12] {message}, and more.",
            message.replace(" ", "  "),
        ):
            assert id in check_ids(f"before\n{line}\nafter"), line


@pytest.mark.parametrize(("id", "symptom"), SYMPTOMS, ids=[f"{id}-{n}" for n, (id, _) in enumerate(SYMPTOMS)])
def test_symptom_matches_whole_words_of_one_line(id: str, symptom: Symptom) -> None:
    """Parts of words, other capitals, or text over two lines do not match."""
    message = symptom.text.replace("…", "3")
    if symptom.text[0].isalnum() or symptom.text[-1].isalnum():
        assert not symptom.pattern.search(f"x{message}x")
    assert not symptom.pattern.search(message.swapcase()) or not any(c.isalpha() for c in message)
    if " " in message:
        assert not symptom.pattern.search(message.replace(" ", "\n"))


def test_find_symptoms_returns_the_first_line_of_each_check_in_order() -> None:
    text = "started\nCUDA error: invalid device ordinal\n  Bus error (core dumped)\nBus error (core dumped)\n"
    assert [(match.number, match.check.id, match.line) for match in find_symptoms(text)] == [
        (2, "G-09", "CUDA error: invalid device ordinal"),
        (3, "S-01", "Bus error (core dumped)"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "rtp-1 exited with code {}",
        "the part ends with exit code {}",
        "exited: rank0 (exit status {}; not expected)",
        "    Exit Code:    {}",
        '{{"ExitCode": {}, "Error": ""}}',
        "  exitcode  : {} (pid: 5678)",
        "0c1d  rtp  Exited ({}) 3 minutes ago",
    ],
)
def test_exit_codes_are_read_as_runtimes_print_them(line: str) -> None:
    for code, ids in EXIT_CODES.items():
        assert check_ids(line.format(code)) == set(ids)
    for code in (135, 137):
        assert check_ids(line.format(code)) == {KILLED[code]}
    for code in (0, 1, 143, 1350):
        assert check_ids(line.format(code)) == set()


def test_the_last_code_of_this_server_counts() -> None:
    """If a log has several exit codes, the part's last one counts: ranks exit with 71 after another rank fails, which
    is only a consequence."""
    assert check_ids("this rank exits (exit code 71)\nthe part ends with exit code 73") == set(EXIT_CODES[73])
    assert check_ids("this rank exits (exit code 71)\nthe part ends with exit code 70") == set()


def test_exit_codes_refer_to_existing_checks() -> None:
    assert {id for ids in EXIT_CODES.values() for id in ids} <= REGISTRY.keys()
    assert {*KILLED.values(), *KILLED_TEXT.values()} <= REGISTRY.keys()
    assert EXIT_CODES.keys() <= set(ExitCode)


@pytest.mark.parametrize(
    "formed_text",
    ["all 4 ranks are here and agree on their settings", "3 ranks kept their weights; ranks that load them: 2"],
)
def test_waiting_is_no_symptom_if_the_gang_forms_later(formed_text: str) -> None:
    waiting = (
        "[part1 rank1] 09:55:30 INFO rtp_llm.parallel.gang_client: waiting for part0 (10.0.0.5:10000, ranks 0-1)\n"
    )
    formed = f"[part1 rank1] 09:55:36 INFO rtp_llm.parallel.gang_client: epoch 1 of the gang begins: {formed_text}\n"
    assert check_ids(waiting) == {"C-09"}
    assert check_ids(f"rtp-1  | {waiting}") == {"C-09"}
    assert check_ids(waiting + formed) == set()
    assert check_ids(waiting + formed + waiting) == {"C-09"}, "the next epoch waits again"


def test_info_lines_of_this_server_are_no_symptom() -> None:
    text = "[part0 rank0] 09:55:36 {} rtp_llm.engine: Bus error (core dumped)"
    json = '{{"time": "2026-03-02T09:54:37.210Z", "level": "{}", "message": "Bus error (core dumped)"}}'
    for line in (text, f"2026-03-02T09:55:36Z {text}", json):
        assert check_ids(line.format("INFO")) == set()
        assert check_ids(line.format("ERROR")) == {"S-01"}


def test_empty_and_random_text_has_no_symptom() -> None:
    assert find_symptoms("") == []
    assert find_symptoms("\0\x1b[31m\n\ufffd" * 100) == []
    assert find_symptoms("(" * 10_000 + "x" * 100_000) == []


def test_quoted_line_has_no_secrets_and_no_escape_sequences(tmp_path: Path) -> None:
    line = "\x1b[31mBus error (core dumped)\x1b[0m HF_TOKEN=hf_abcdefghijklmnop --api-key sk-12 --token very\n"
    (tmp_path / "log").write_text(line)
    process = doctor("explain-log", str(tmp_path / "log"))
    quoted = process.stdout.splitlines()[0]
    assert "Bus error (core dumped)" in quoted
    for hidden in ("\x1b", "hf_abcdefghijklmnop", "sk-12", "very"):
        assert hidden not in quoted
