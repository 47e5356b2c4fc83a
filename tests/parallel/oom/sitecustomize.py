"""Python imports this at the start of every process of a part that has this folder in PYTHONPATH.

On rank 1 the forward pass then fails for steps of more than MAX_TOKENS tokens, as if the device had no memory for them.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE, MAX_TOKENS = "rtp_llm.runner.model_runner", 32


class Finder(MetaPathFinder):
    """Patches MODULE when it is imported, so that processes which do not need torch do not import it."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.loader
        exec_module = spec.loader.exec_module

        def exec_and_patch(module: ModuleType) -> None:
            exec_module(module)
            patch(module)

        spec.loader.exec_module = exec_and_patch  # type: ignore[method-assign]
        return spec


def patch(module: ModuleType) -> None:
    import torch

    forward = module.ModelRunner.forward

    def failing_forward(self: Any, inputs: Any) -> torch.Tensor:
        if self.residency.mesh.tp.rank == 1 and inputs.step.num_tokens > MAX_TOKENS:
            raise torch.OutOfMemoryError("a test has taken the memory")
        result: torch.Tensor = forward(self, inputs)
        return result

    module.ModelRunner.forward = failing_forward


sys.meta_path.insert(0, Finder())
