"""Does on CPU what a CUDA graph does on a GPU: repeats work on the same tensors, without the Python code around it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rtp_llm.kernels import triton_attention, triton_ops

KERNELS = [(module, name) for module in (triton_attention, triton_ops) for name in vars(module) if "_kernel" in name]
# They read a number on the host, or copy one from there.
FORBIDDEN = ("_local_scalar_dense", "lift_fresh")


class EmulatedGraph:
    """Records torch's operations and the launches of Triton's kernels: the functions, tensors and numbers."""

    def __init__(self, other: "EmulatedGraph | None"):
        self._calls: list[Callable[[], object]] = []

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        with _no_copies_to_the_device(), _recorded_kernels(self._calls), _RecordedOperations(self._calls):
            return function()

    def replay(self) -> None:
        for call in self._calls:
            call()

    def reset(self) -> None:
        self._calls.clear()


class _RecordedOperations(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], object]]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in FORBIDDEN), f"a CUDA graph cannot contain {func}"
        result = func(*args, **(kwargs or {}))
        self._calls.append(partial(_repeat, func, args, kwargs or {}, result))
        return result


def _repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Calls an operation again, and gives the tensors of its result their new contents."""
    for tensor, newer in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(tensor, Tensor) and tensor.data_ptr() != newer.data_ptr():
            tensor.copy_(newer)


class _RecordedKernel:
    def __init__(self, kernel: Any, calls: list[Callable[[], object]]):
        self._kernel, self._calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            call = partial(self._kernel[grid], *args, **kwargs)
            with _disable_current_modes():  # the interpreter's own operations are not the kernel's
                call()
            self._calls.append(call)

        return launch


def _no_copies_to_the_device() -> Any:
    """Makes `to_tensor` fail, which copies arrays to the device: a CUDA graph cannot do that."""
    return mock.patch(
        "torch.from_numpy", side_effect=AssertionError("a CUDA graph cannot contain a copy from the host")
    )


@contextmanager
def _recorded_kernels(calls: list[Callable[[], object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, _RecordedKernel(getattr(module, name), calls)))
        yield
