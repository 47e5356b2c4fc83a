"""Enforces the layers of the architecture: reads the imports of each module from its source."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rtp_llm"
DOCTOR = ROOT.parent / "doctor"

# The layers, lowest first: a module imports from its own package and lower ones, and only what ALLOWED lists.
LAYERS = (
    *("errors", "files", "garbage", "log", "metrics", "config", "hub"),
    *("contract", "machine", "text", "native", "parallel", "kernels", "layers", "model", "runner", "engine"),
    *("api", "supervise", "start_server", "bench"),
)
BASE = {"rtp_llm", "config", "errors", "files", "garbage", "log", "metrics"}
TORCH_FREE_MODEL = {"model.spec", "model.checkpoint", "model.footprint", "model.kv_cache_specs", "model.task"}
SCHEDULING = {
    *(
        "engine.admission_control",
        "engine.block_hash",
        "engine.block_pool",
        "engine.engine",
        "engine.forced_tokens",
        "engine.kv_cache_manager",
    ),
    *("engine.grammar_compiler", "engine.itl_budget", "engine.memory_budget", "engine.prompt_budget"),
    *("engine.proposer", "engine.scheduler", "engine.scheduler_config", "engine.scheduler_output"),
    *("engine.step_builder", "engine.step_cost"),
}
# By package, and by module if its rule is stricter than the package's.
ALLOWED: dict[str, set[str]] = {
    "config": {"errors", "files"},
    "errors": set(),
    "files": set(),
    "garbage": set(),
    "log": set(),
    "metrics": set(),
    "contract": {"contract"},
    "hub": {"hub", "config", "errors"},
    "hub.name": set(),
    "machine": BASE | {"machine"},
    "native": BASE | {"native"},
    "native.build": set(),
    "native.levels": set(),
    "parallel": BASE | {"parallel", "machine", "native"},
    "kernels": BASE | {"kernels", "native", "contract"},
    "layers": BASE | {"layers", "kernels", "parallel", "contract"},
    "model": BASE | {"model", "layers", "kernels", "parallel", "contract"},
    "model.spec": BASE | {"layers.rope_spec"},
    "model.checkpoint": BASE | {"model.spec", "model.task"},
    "model.task": BASE | {"parallel.part_spec"},
    "model.tensor_names": BASE,
    "model.kv_cache_specs": BASE | {"model.spec", "contract.kv_cache", "parallel.sharding"},
    "model.footprint": BASE | {"model.spec", "model.kv_cache_specs", "contract.kv_cache", "parallel.sharding"},
    "runner": BASE | {"runner", "model", "layers", "kernels", "native", "parallel", "machine", "contract"},
    "engine": BASE | {"engine", "runner", "native", "parallel", "machine", "contract"} | TORCH_FREE_MODEL,
    "engine.vocabulary": BASE | {"text.tokenizer"},
    **{module: BASE | {"contract"} | SCHEDULING for module in SCHEDULING},
    "text": BASE | {"text", "contract"},
    "api": BASE
    | {"api", "text", "contract", "machine", "parallel.part_spec", "parallel.segment", "parallel.wire", "hub"},
    "supervise": BASE
    | {"supervise", "machine"}
    | {f"parallel.{module}" for module in ("part_spec", "coordinator_connection", "handshake", "wire")},
    "start_server": BASE | {"hub", "machine", "parallel", "supervise"} | TORCH_FREE_MODEL,
    "bench": BASE | {"bench", "machine"} | TORCH_FREE_MODEL,
    # Other Pythons, without our dependencies, run these.
    "bench.record": {"bench.record"},
    **{
        f"bench.peers.{module}": {"bench.record", "bench.peers.worker"}
        for module in ("worker", "gguf_file", "openvino", "transformers")
    },
    "bench.peers.offline": BASE
    | {"bench.peers.worker", "engine", "runner", "parallel", "machine", "contract"}
    | TORCH_FREE_MODEL,
}
# The doctor reads settings, plan and checkpoint with the server's code, and does not import torch.
DOCTOR_MAY_IMPORT = BASE | {"hub", "machine", "parallel", *TORCH_FREE_MODEL}
TORCH = {"torch", "triton", "safetensors", "safetensors.torch"}
MAY_USE_TORCH = {
    *("kernels", "layers", "model", "runner"),
    *(
        "engine.epoch",
        "engine.rank",
        "parallel.group",
        "parallel.mesh",
        "parallel.shared_memory",
        "parallel.native_exchange",
    ),
    *("bench.checkpoint", "bench.probe", "bench.peers.offline", "bench.peers.transformers"),
}
TORCH_FREE = {"layers.rope_spec", "model.tensor_names", *TORCH_FREE_MODEL}
# The only imports inside a function: torch must not be imported before the gang has formed (see the comment there),
# huggingface_hub, which takes longer than all checks of the doctor, only if a model is given by its name, and
# matplotlib only where it is installed.
IMPORTED_LATE = {
    *(("engine.main", "engine.rank"), ("hub.settings", "hub.cache"), ("start_server", "hub.remote")),
    # Only machines with a GPU have Triton.
    *(("kernels.triton_kernels", "kernels.triton_ops"), ("kernels.triton_kernels", "kernels.triton_attention")),
}
IMPORTED_LATE |= {("bench.cli", "bench.plots")}


def modules(root: Path = ROOT) -> list[str]:
    names = (".".join(p.relative_to(root).with_suffix("").parts) for p in sorted(root.rglob("*.py")))
    return [name for name in names if not name.endswith("__init__")]


def imports(module: str, root: Path = ROOT) -> Iterator[tuple[str, bool]]:
    """Yields (imported module, is inside a function) for every import statement."""
    tree = ast.parse((root / Path(*module.split("."))).with_suffix(".py").read_text())
    in_function = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module and node.module.split(".")[0] in ("rtp_llm", "doctor") and not is_module(node.module):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, id(node) in in_function) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in in_function) for alias in node.names)


def is_module(name: str) -> bool:
    return (ROOT.parent / Path(*name.split("."))).with_suffix(".py").exists()


def relative_name(name: str) -> str:
    """Converts `rtp_llm.api.client` to `api.client` and `rtp_llm.__version__` to `rtp_llm`."""
    relative = name.removeprefix("rtp_llm").removeprefix(".")
    return relative if relative and not relative.startswith("__") else "rtp_llm"


def is_covered(name: str, allowed: set[str]) -> bool:
    return name in allowed or name.split(".")[0] in allowed


@pytest.mark.parametrize("module", modules())
def test_imports_only_what_the_architecture_allows(module: str) -> None:
    allowed = ALLOWED.get(module) or ALLOWED[module.split(".")[0]]
    for name, late in imports(module):
        assert name.split(".")[0] != "doctor", f"{module} must not import the doctor"
        if not name.startswith("rtp_llm"):
            continue
        target = relative_name(name)
        assert not late or (module, target) in IMPORTED_LATE, f"{module} imports {target} inside a function"
        assert is_covered(target, allowed), f"{module} must not import {target}"


@pytest.mark.parametrize("module", modules())
def test_only_device_modules_import_torch(module: str) -> None:
    if is_covered(module, MAY_USE_TORCH) and module not in TORCH_FREE:
        return
    assert not [name for name, _ in imports(module) if name in TORCH or name.startswith(("torch.", "triton."))]


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("contract.") or m in SCHEDULING])
def test_contract_and_scheduling_use_no_sockets(module: str) -> None:
    assert not [name for name, _ in imports(module) if name.split(".")[0] in {"socket", "asyncio", "selectors"}]


@pytest.mark.parametrize("module", modules(DOCTOR))
def test_doctor_imports_only_torch_free_server_code(module: str) -> None:
    for name, late in imports(module, DOCTOR):
        if late and module == "all_reduce":  # each rank of tier 3 is a separate process
            continue
        assert name.split(".")[0] not in TORCH, f"doctor.{module} imports {name}"
        assert name not in {f"rtp_llm.{module}" for module in MAY_USE_TORCH}
        assert not name.startswith("rtp_llm") or is_covered(relative_name(name), DOCTOR_MAY_IMPORT), (
            f"doctor.{module} imports {name}"
        )


def test_every_package_is_listed() -> None:
    assert {m.split(".")[0] for m in modules()} == {name.split(".")[0] for name in ALLOWED} == set(LAYERS)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_no_allowed_import_points_up(name: str) -> None:
    package = LAYERS.index(name.split(".")[0])
    assert not {t for t in ALLOWED[name] - {"rtp_llm"} if LAYERS.index(t.split(".")[0]) > package}


@pytest.mark.parametrize("root", [ROOT, DOCTOR], ids=["rtp_llm", "doctor"])
def test_modules_import_each_other_without_a_cycle(root: Path) -> None:
    graph = {
        module: {name.removeprefix(f"{root.name}.") for name, _ in imports(module, root) if is_module(name)}
        for module in modules(root)
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle
