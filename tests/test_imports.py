"""The arrows of the architecture, enforced: who may import whom, read from the source without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rtp_llm"
DOCTOR = ROOT.parent / "doctor"
EVERYBODY = {"rtp_llm", "config", "errors", "files", "log", "metrics"}

# Packages, and single modules that are stricter or freer than their package. A module may import its own package's
# neighbours where the package is listed for itself, and whatever is listed here; nothing else of ours.
PURE_ENGINE = {"engine.request", "engine.blocks", "engine.scheduler", "engine.step", "engine.sampling"}
TORCH_FREE_MODEL = {"model.spec", "model.checkpoint", "model.footprint"}
HANDED_OVER = {"parallel.handover", "parallel.lifeline", "parallel.wire"}
ALLOWED: dict[str, set[str]] = {
    "config": {"errors", "files"},
    "errors": set(),
    "files": set(),
    "log": set(),
    "metrics": set(),
    "start_server": EVERYBODY | {"machine", "parallel", "supervise"} | TORCH_FREE_MODEL,
    "text": EVERYBODY | {"text"},
    "machine": EVERYBODY | {"machine"},
    "parallel": EVERYBODY | {"parallel", "machine"},
    "kernels": EVERYBODY | {"kernels", "engine.step"},
    "layers": EVERYBODY | {"layers", "kernels", "parallel", "engine.request", "engine.sampling"},
    "model": EVERYBODY | {"model", "layers", "kernels", "parallel"},
    "runner": EVERYBODY | {"runner", "model", "layers", "kernels", "parallel"} | PURE_ENGINE,
    "engine": EVERYBODY | {"engine", "runner", "parallel", "machine"} | TORCH_FREE_MODEL,
    **{module: EVERYBODY | PURE_ENGINE for module in (*PURE_ENGINE, "engine.engine")},
    "model.spec": EVERYBODY | {"layers.rope_spec"},
    "model.checkpoint": EVERYBODY | {"model.spec"},
    "model.footprint": EVERYBODY | {"model.spec", "parallel.sharding"},
    "api": EVERYBODY | {"api", "text", "machine", "engine.request", "parallel.segment"} | HANDED_OVER,
    "supervise": EVERYBODY | {"supervise"} | HANDED_OVER,
}
# What the doctor judges with: the server's own settings, plan and checkpoint code, and nothing that loads torch.
FOR_THE_DOCTOR = EVERYBODY | {"machine", "parallel", *TORCH_FREE_MODEL}
TORCH = {"torch", "triton", "safetensors", "safetensors.torch"}
MAY_USE_TORCH = {
    *("kernels", "layers", "model", "runner"),
    *("engine.loop", "engine.rank", "parallel.group", "parallel.shared_memory"),
}
NO_TORCH_AFTER_ALL = {"layers.rope_spec", *TORCH_FREE_MODEL}
NO_SOCKETS = {"engine.blocks", "engine.scheduler", "engine.step", "engine.engine"}
# The one import inside a function: torch must not be loaded before the gang has agreed (see the comment there).
LATE = {("engine.main", "engine.rank")}


def modules(root: Path = ROOT) -> list[str]:
    names = (".".join(p.relative_to(root).with_suffix("").parts) for p in sorted(root.rglob("*.py")))
    return [name for name in names if not name.endswith("__init__")]


def imports(module: str, root: Path = ROOT) -> Iterator[tuple[str, bool]]:
    """(imported module, whether inside a function) of every import statement."""
    tree = ast.parse((root / Path(*module.split("."))).with_suffix(".py").read_text())
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module and node.module.startswith("rtp_llm") and not is_module(node.module):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, id(node) in inside) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)


def is_module(name: str) -> bool:
    return (ROOT.parent / Path(*name.split("."))).with_suffix(".py").exists()


def ours(name: str) -> str:
    """`rtp_llm.api.client` to `api.client`; `rtp_llm.__version__` to `rtp_llm`."""
    rest = name.removeprefix("rtp_llm").removeprefix(".")
    return rest if rest and not rest.startswith("__") else "rtp_llm"


def covered(name: str, allowed: set[str]) -> bool:
    return name in allowed or name.split(".")[0] in allowed


@pytest.mark.parametrize("module", modules())
def test_imports_only_what_the_architecture_allows(module: str) -> None:
    allowed = ALLOWED.get(module) or ALLOWED[module.split(".")[0]]
    for name, late in imports(module):
        assert name.split(".")[0] != "doctor", f"{module} must not import the doctor"
        if not name.startswith("rtp_llm"):
            continue
        target = ours(name)
        assert not late or (module, target) in LATE, f"{module} imports {target} inside a function"
        assert covered(target, allowed), f"{module} must not import {target}"


@pytest.mark.parametrize("module", modules())
def test_torch_stays_where_the_device_work_is(module: str) -> None:
    if covered(module, MAY_USE_TORCH) and module not in NO_TORCH_AFTER_ALL:
        return
    assert not [name for name, _ in imports(module) if name in TORCH or name.startswith(("torch.", "triton."))]


@pytest.mark.parametrize("module", sorted(NO_SOCKETS))
def test_the_pure_engine_knows_no_sockets(module: str) -> None:
    assert not [name for name, _ in imports(module) if name.split(".")[0] in {"socket", "asyncio", "selectors"}]


@pytest.mark.parametrize("module", modules(DOCTOR))
def test_the_doctor_judges_with_the_servers_own_code_and_without_torch(module: str) -> None:
    for name, late in imports(module, DOCTOR):
        if late and module == "collective":  # one rank of tier 3, a process of its own
            continue
        assert name.split(".")[0] not in TORCH, f"doctor.{module} imports {name}"
        assert name not in ("rtp_llm.parallel.group", "rtp_llm.parallel.shared_memory")
        assert not name.startswith("rtp_llm") or covered(ours(name), FOR_THE_DOCTOR), f"doctor.{module} imports {name}"


def test_every_package_has_its_arrows() -> None:
    assert {m.split(".")[0] for m in modules()} <= ALLOWED.keys()
