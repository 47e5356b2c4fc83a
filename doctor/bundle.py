"""`--bundle`: what somebody who helps needs to see, in one file, with every secret left out.

The same input gives the same bytes: times and owners in the archive are fixed.
"""

import gzip
import io
import re
import tarfile
from pathlib import Path

from doctor.host import Host, is_secret
from doctor.report import Report
from rtp_llm.config import Config, upstream_variables

LOG_BYTES = 256 << 10
STATE = ("gang.json", "guard.json", "part.json", "supervisord.log")
OTHERS = re.compile(r"(NCCL_|GLOO_|CUDA_|NVIDIA_|TORCH_|RTP_|KUBERNETES_SERVICE_HOST$|HOSTNAME$|OMP_)")
CREDENTIAL = re.compile(
    r"(?i)(authorization:\s*(?:bearer|basic)\s+|bearer\s+|[\w-]*(?:secret|token|password|api[_-]?key)[\w-]*\"?\s*[:=]\s*\"?)"
    r"[^\s\",;}]+"
)
URL_PASSWORD = re.compile(r"(://[^/\s:@]+:)[^@\s/]+@")


def write_bundle(path: Path, report: Report, host: Host, run_dir: str = "") -> list[str]:
    """Writes a gzipped tar archive; returns the names in it. Raises OSError."""
    files = {"report.json": report.to_json(), "environment.txt": environment(host)}
    for name in ("/proc/self/mountinfo", "/proc/self/limits", "/proc/self/cgroup", "/etc/nccl.conf"):
        text = host.read(name)
        if text is not None:
            files[f"host{name}"] = text
    for name in STATE if run_dir else ():
        file = Path(run_dir) / name
        if file.exists():
            files[f"part/{name}"] = file.read_text(errors="replace")[-LOG_BYTES:]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in sorted(files.items()):
            data = redact(text).encode()
            entry = tarfile.TarInfo(f"rtp-llm-doctor/{name.replace('//', '/')}")
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return sorted(files)


def environment(host: Host) -> str:
    """The variables that this server, NCCL or CUDA would read; no others, and no secrets."""
    known = {name.upper() for name in Config.model_fields} | upstream_variables().keys()
    shown = {n: v for n, v in sorted(host.environ.items()) if (n in known or OTHERS.match(n))}
    return "".join(f"{n}={'(left out)' if is_secret(n) else v}\n" for n, v in shown.items())


def redact(text: str) -> str:
    """Takes out what looks like a credential: bearer tokens, key=value with a secret's name, passwords in URLs."""
    text = CREDENTIAL.sub(lambda match: f"{match[1]}(left out)", text)
    return URL_PASSWORD.sub(r"\1(left out)@", text)
