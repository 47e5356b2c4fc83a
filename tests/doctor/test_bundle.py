"""The bundle: reproducible, and without secrets."""

import json
import re
import tarfile
import time
from pathlib import Path

import pytest

from doctor.bundle import REDACTED, redact, write_bundle
from doctor.check import REGISTRY, error
from doctor.host import is_secret
from doctor.report import Report, make_finding
from doctor.runtime import Runtime
from rtp_llm.config import Config
from tests.doctor.faulty import faulty_report
from tests.doctor.fixtures import DEMO, FakeHost, doctor

SECRETS = {
    "GANG_SECRET": "hunter2-of-the-gang",
    "RTP_API_KEY": 'key with spaces, commas; and "quotes"',
    "NCCL_PRIVATE_TOKEN": "correct horse",
    "CUDA_PASSWORD": "pä55wörd",
    "TORCH_CREDENTIAL": "two\nlines",
    "RTP_MYKEY": "of-my-own",
    "RTP_CREDS": "user-and-word",
    "NCCL_PASS": "open-sesame",
}
PUBLIC = {"TP_SIZE": "2", "TOKENIZER_PATH": "/models/demo", "MAX_BATCH_TOKENS_SIZE": "4096", "NCCL_DEBUG": "INFO"}
# A line with a credential, and the text that must be redacted.
SHAPES = [
    ("Authorization: Bearer abc.def-ghi", "abc.def-ghi"),
    ('{"authorization": "Basic dXNlcjpwYXNz"}', "dXNlcjpwYXNz"),
    ("curl -H 'X-Api-Key: 0123456789abcdef'", "0123456789abcdef"),
    ("GANG_SECRET=hunter2", "hunter2"),
    ("GANG_SERCET -> GANG_SECRET=hunter2", "hunter2"),
    ("--gang-secret=hunter2 --port 1", "hunter2"),
    ('"gang_secret": "a secret, of words"', "a secret, of words"),
    ("{'password': 'a secret, of words'}", "a secret, of words"),
    ("aws_secret_access_key = AbC/dEf+gHi", "AbC/dEf+gHi"),
    ("passwd: hunter2", "hunter2"),
    ("--gang_secret 'a secret, of words'", "a secret, of words"),
    ("['server', '--api-key', 'hunter2']", "hunter2"),
    ("RTP_MYKEY=hunter2", "hunter2"),
    ("DB_PASS: hunter2", "hunter2"),
    ("-ssl-key hunter2", "hunter2"),
    ("https://user:hunter2@mirror.example/models", "hunter2"),
    ("redis://:hunter2@cache:6379/0", "hunter2"),
    ("found hf_abcdefghijklmnop in the cache", "hf_abcdefghijklmnop"),
    ("ghp_0123456789abcdefghij", "ghp_0123456789abcdefghij"),
    ("sk-proj-0123456789abcdef", "sk-proj-0123456789abcdef"),
    ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", "eyJzdWIiOiIxIn0"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----", "MIIEow"),
]
HARMLESS = [
    "TOKENIZER_PATH=/models/demo",
    "MAX_BATCH_TOKENS_SIZE=4096",
    "longest context that fits: 6023703 tokens",
    "tokens: 4096",
    "tokenizer.json, 1024 tokens",
    "port 10000, for HTTP (START_PORT): in use by pid 7 (nginx: master process nginx)",
    "http://10.0.0.5:10000/health",
    "DEFAULT_CHAT_TEMPLATE_KEY=default",
    "--default_tool_use_template_key tool_use",
    "--tokenizer_path /models/demo",
    "RTP_KEYBOARD=us",
    "NCCL_BYPASS=1",
    '{"key": "env.NCCL_ALGO", "values": {}}',
    "use --gang-secret --port 1",
    "1 0 0:30 / / rw,relatime - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/ABC:/var/lib/docker",
    "task-0123456789abcdef",
]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """A report with a finding that contains every secret, as a finding that quotes a setting may."""
    report = faulty_report(tmp_path / "machine", Runtime.DOCKER, monkeypatch)
    text = "; ".join(SECRETS.values())
    leak = make_finding(REGISTRY["M-13"], error(text, "nothing", f"say {text}", values=list(SECRETS.values())), 0.0)
    return report.model_copy(update={"checks": [leak, *report.checks]})


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path / "machine", {**SECRETS, **PUBLIC, "HF_TOKEN": "hf-of-another-user", "EDITOR": "ed"})
    host.write("/etc/nccl.conf", "NCCL_DEBUG=WARN\nNCCL_SECRET=of-the-file\n")
    return host


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "part.json").write_text(json.dumps({"config": {"tp_size": 2}}))
    (path / "supervisord.log").write_text(
        "x" * (300 << 10) + f"\nAuthorization: Bearer {SECRETS['GANG_SECRET']}\nlast line\n"
    )
    (path / "engine.sock").write_text("not to be read")
    return path


def contents(bundle: Path) -> dict[str, str]:
    with tarfile.open(bundle) as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive}  # type: ignore[union-attr]


def test_names(report: Report, host: FakeHost, run_dir: Path, tmp_path: Path) -> None:
    always = [
        "environment.txt",
        "host/etc/nccl.conf",
        *(f"host/proc/self/{n}" for n in ("cgroup", "limits", "mountinfo")),
    ]
    names = write_bundle(tmp_path / "bundle.tgz", report, host)
    assert names == sorted([*always, "report.json"])
    names = write_bundle(tmp_path / "bundle.tgz", report, host, str(run_dir))
    assert names == sorted([*always, "part/part.json", "part/supervisord.log", "report.json"])
    assert sorted(contents(tmp_path / "bundle.tgz")) == [f"rtp-llm-doctor/{name}" for name in names]


def test_archive_extracts_into_one_directory(report: Report, host: FakeHost, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle.tgz", report, host)
    with tarfile.open(tmp_path / "bundle.tgz") as archive:
        # Python 3.11.2, Debian 12's, has no filters yet, and ignores the attribute.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(tmp_path / "out")
    assert (tmp_path / "out" / "rtp-llm-doctor" / "report.json").exists()


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    report: Report, host: FakeHost, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "one.tgz", report, host, str(run_dir))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write_bundle(tmp_path / "other.tgz", report, host, str(run_dir))
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "other.tgz").read_bytes()


def test_bundle_has_no_secret(report: Report, host: FakeHost, run_dir: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle.tgz", report, host, str(run_dir))
    files = contents(tmp_path / "bundle.tgz")
    for secret in [*SECRETS.values(), "hf-of-another-user", "of-the-file"]:
        for name, text in files.items():
            assert secret not in text, name
            assert json.dumps(secret)[1:-1] not in text, name
    assert REDACTED in files["rtp-llm-doctor/report.json"]


def test_bundled_report_is_valid(report: Report, host: FakeHost, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle.tgz", report, host)
    bundled = Report.model_validate_json(contents(tmp_path / "bundle.tgz")["rtp-llm-doctor/report.json"])
    assert [f.id for f in bundled.checks] == [f.id for f in report.checks]
    assert bundled.checks[1:] == report.checks[1:]


def test_environment_has_only_variables_that_the_server_reads(report: Report, host: FakeHost, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle.tgz", report, host)
    rows = contents(tmp_path / "bundle.tgz")["rtp-llm-doctor/environment.txt"].splitlines()
    public = PUBLIC | {"CHECKPOINT_PATH": str(DEMO)}
    assert sorted(rows) == sorted([*(f"{n}={v}" for n, v in public.items()), *(f"{n}={REDACTED}" for n in SECRETS)])


@pytest.mark.slow
def test_long_log_is_truncated_to_its_end(report: Report, host: FakeHost, run_dir: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle.tgz", report, host, str(run_dir))
    log = contents(tmp_path / "bundle.tgz")["rtp-llm-doctor/part/supervisord.log"]
    assert log.endswith("last line\n")
    assert len(log) <= 256 << 10


@pytest.mark.parametrize(("line", "secret"), SHAPES)
def test_credentials_are_redacted(line: str, secret: str) -> None:
    for text in (line, f"before {line} after", f"before\n{line}\nafter"):
        assert secret not in redact(text)
        assert REDACTED in redact(text)
    assert redact(redact(line)) == redact(line)


@pytest.mark.parametrize("line", HARMLESS)
def test_harmless_text_is_not_redacted(line: str) -> None:
    assert redact(line) == line


def test_redacted_json_is_valid() -> None:
    data = {"gang_secret": "hunter2", "password": "", "url": "https://u:p@h/x", "text": "token=abc", "n": [1]}
    assert json.loads(redact(json.dumps(data))) == {
        "gang_secret": REDACTED,
        "password": REDACTED,
        "url": f"https://u:{REDACTED}@h/x",
        "text": f"token={REDACTED}",
        "n": [1],
    }


def test_secret_settings() -> None:
    assert {name for name in Config.model_fields if is_secret(name)} == {
        *("gang_secret", "gang_secret_file", "api_key", "api_key_file", "admin_key", "admin_key_file"),
    }


def test_switch_values_are_not_redacted() -> None:
    assert redact('{"warm_up": true}', ["true"]) == '{"warm_up": true}'


@pytest.mark.slow
def test_redact_of_a_long_word_is_fast() -> None:
    word = "x" * (200 << 10)
    assert redact(word) == word


def test_a_real_bundle(tmp_path: Path) -> None:
    """The bundle of this machine contains no secret, also if the environment holds bytes that are not valid UTF-8."""
    path = tmp_path / "bundle.tgz"
    env = {"GANG_SECRET": "hunter2-of-the-gang", "AUX_STRING": "\udcff", "START_PORT": "19851"}
    done = doctor("--bundle", str(path), env=env)
    assert done.returncode == 0, done.stderr
    assert re.match(
        rf"{re.escape(str(path))}: environment\.txt, .*report\.json; read it before you pass it on", done.stderr
    )
    files = contents(path)
    assert "GANG_SECRET=(redacted)\n" in files["rtp-llm-doctor/environment.txt"]
    assert "AUX_STRING=\\udcff\n" in files["rtp-llm-doctor/environment.txt"]
    assert not any("hunter2" in text for text in files.values())
