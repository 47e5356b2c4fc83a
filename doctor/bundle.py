"""`--bundle`: writes report, settings and logs for a support request into one archive, without secrets.

The same input gives the same bytes, because file times and owners in the archive are constants.
"""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from doctor.host import SECRET, Host, is_secret
from doctor.report import Report
from rtp_llm.config import Config, upstream_variables

LOG_BYTES = 256 << 10
STATE_FILES = ("gang.json", "guard.json", "part.json", "supervisord.log")
ENV_PATTERN = re.compile(r"(NCCL_|GLOO_|CUDA_|NVIDIA_|TORCH_|RTP_|KUBERNETES_SERVICE_HOST$|HOSTNAME$|OMP_)")
REDACTED = "(redacted)"
NAME = rf"[\w-]{{0,40}}(?:{SECRET})[\w-]*"
CREDENTIAL = re.compile(
    rf"(?i)(authorization\"?:\s*\"?(?:bearer|basic)\s+|bearer\s+|{NAME}[\"']?\s*[:=]\s*"
    rf"|(?<![\w-])--?{NAME}[\"']?,?\s+(?!-))"
    rf"({re.escape(REDACTED)}|\"[^\"]*\"|'[^']*'|[^\s\",;}}]+)"
)
URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^@\s/]+@")
# Tokens with a known prefix (Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, Google, NVIDIA), JWTs, private keys.
TOKEN = re.compile(
    r"\b(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|nvapi-|eyJ[\w-]+\.eyJ)[\w.-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    re.DOTALL,
)
MIN_SECRET_LENGTH = 4  # redacting shorter values would also redact ordinary words
NON_SECRET_VALUES = {"true", "false", "none", "null", "auto"}  # of switches whose name looks like that of a secret


def write_bundle(path: Path, report: Report, host: Host, run_dir: str = "") -> list[str]:
    """Writes a gzipped tar archive to `path`, without secrets: the report, the environment variables, nccl.conf,
    and the limits, mounts and cgroup of this process. Returns the sorted names of the files in it.

    `run_dir`: if not empty, adds the state files and the log from this run directory. Raises OSError if `path` cannot
    be written.
    """
    files = {"report.json": report.to_json(), "environment.txt": environment_listing(host)}
    for name in ("/proc/self/mountinfo", "/proc/self/limits", "/proc/self/cgroup", "/etc/nccl.conf"):
        text = host.read(name)
        if text is not None:
            files[f"host{name}"] = text
    for name in STATE_FILES if run_dir else ():
        file = Path(run_dir) / name
        if file.exists():
            files[f"part/{name}"] = file.read_text(errors="replace")[-LOG_BYTES:]
    secrets = [value for name, value in host.environ.items() if is_secret(name)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in sorted(files.items()):
            data = redact(text, secrets).encode(errors="backslashreplace")
            entry = tarfile.TarInfo(f"rtp-llm-doctor/{name.replace('//', '/')}")
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return sorted(files)


def environment_listing(host: Host) -> str:
    """Returns a line NAME=value for each environment variable that concerns this server, NCCL, gloo, CUDA, torch or
    OpenMP. Values of secrets are replaced by "(redacted)"; other variables are left out.
    """
    known = {name.upper() for name in Config.model_fields} | upstream_variables().keys()
    return "".join(
        f"{name}={REDACTED if is_secret(name) else value}\n"
        for name, value in sorted(host.environ.items())
        if name in known or ENV_PATTERN.match(name)
    )


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns `text` with "(redacted)" in place of `secrets`, JSON-encoded ones included, and of text that looks like a
    credential.

    Credentials are bearer tokens, known token formats, key=value pairs with a secret's name, passwords in URLs and
    private keys.
    """
    searchable = [s for s in secrets if len(s) >= MIN_SECRET_LENGTH and s.lower() not in NON_SECRET_VALUES]
    spellings = {spelling for secret in searchable for spelling in (secret, json.dumps(secret)[1:-1])}
    for spelling in sorted(spellings, key=len, reverse=True):  # longest first: a secret may contain a shorter one
        text = text.replace(spelling, REDACTED)
    text = TOKEN.sub(REDACTED, text)
    text = CREDENTIAL.sub(lambda match: match[1] + _quoted_value(match[2]), text)
    return URL_PASSWORD.sub(rf"\1{REDACTED}@", text)


def _quoted_value(value: str) -> str:
    """Returns "(redacted)" in the same quotes as `value`, so that JSON remains valid."""
    quote = value[0] if value[0] in "\"'" else ""
    return f"{quote}{REDACTED}{quote}"
