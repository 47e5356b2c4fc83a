"""Calls of kernels that are recorded and made again."""

from threading import Barrier, Thread

import torch
from torch import Tensor

from rtp_llm.native.library import Library
from rtp_llm.native.tape import Tape, recording

SECONDS = 30


def normalized(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def test_a_replay_reads_what_is_then_there(level: Library) -> None:
    x, y, weight = torch.randn(1, 40), torch.empty(1, 40), torch.ones(40)
    with recording(level) as tape:
        level.rtp_rms_norm(0, x.data_ptr(), 40, weight.data_ptr(), y.data_ptr(), 1, 40, 0.0, 1)
    x.copy_(torch.randn(1, 40))
    tape.replay()
    assert torch.allclose(y, normalized(x))
    assert tape.unrecorded == set()


def test_calls_on_the_host_run_in_their_place(level: Library) -> None:
    x, y, weight = torch.randn(1, 40), torch.empty(1, 40), torch.ones(40)
    seen: list[Tensor] = []
    with recording(level) as tape:
        level.rtp_rms_norm(0, x.data_ptr(), 40, weight.data_ptr(), y.data_ptr(), 1, 40, 0.0, 1)
        tape.call_on_host(lambda: seen.append(y.clone()))
        level.rtp_rms_norm(0, y.data_ptr(), 40, weight.data_ptr(), x.data_ptr(), 1, 40, 0.0, 1)
    x.mul_(torch.arange(40))
    expected = normalized(x)
    tape.replay()
    assert len(seen) == 2
    assert torch.allclose(seen[1], expected)


def test_other_functions_are_named(level: Library) -> None:
    logits, tokens = torch.randn(1, 40), torch.empty(1, dtype=torch.int64)
    with recording(level) as tape:
        level.rtp_argmax_finite(logits.data_ptr(), 40, 1, 40, tokens.data_ptr(), 1)
    assert tape.unrecorded == {"rtp_argmax_finite"}


def test_threads_record_their_own_calls_at_the_same_time(level: Library) -> None:
    """Their recordings begin and end in every order; after the last one the functions are those of the library."""
    functions = {name: getattr(level, name) for name in ("rtp_rms_norm", "rtp_argmax_finite")}
    weight = torch.ones(40)
    inputs, outputs = torch.randn(3, 1, 40), torch.zeros(3, 1, 40)
    tapes: dict[int, Tape] = {}
    started, called = Barrier(3, timeout=SECONDS), Barrier(3, timeout=SECONDS)

    def record(rank: int) -> None:
        with recording(level) as tape:
            started.wait()
            arguments = (inputs[rank].data_ptr(), 40, weight.data_ptr(), outputs[rank].data_ptr(), 1, 40, 0.0, 1)
            level.rtp_rms_norm(0, *arguments)
            called.wait()
        tapes[rank] = tape

    threads = [Thread(target=record, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: getattr(level, name) for name in functions} == functions
    for rank in range(3):
        outputs.zero_()
        tapes[rank].replay()
        assert torch.allclose(outputs[rank], normalized(inputs[rank]), atol=1e-6)
        assert sum(bool(output.any()) for output in outputs) == 1
