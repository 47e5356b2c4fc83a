"""Every family and rope variant gives the same greedy tokens as transformers, and logits within 1e-4."""

from unittest import mock

import pytest

from tests.model import drive
from tests.model.checkpoints import CASES, QUICK
from tests.model.conftest import TP_SIZES, Oracles
from tests.model.oracle import Oracle
from tests.model.rank_pool import RankPool
from tests.quick import slow_except

NAMES = [case.name for case in CASES]
# The same models as the cases without the suffix -older or -older-sharded, in other file formats; only loading differs.
OTHER_FILES = [
    "llama-tied-older-sharded",
    "rope-linear-older",
    "rope-dynamic-older",
    "rope-llama3-older",
]
# Each family and each kind of rope. The product uses gloo between machines; on one machine it reduces through shared
# memory, which is much faster.
OVER_GLOO = [
    "llama-biases",
    "rope-linear",
    "rope-dynamic",
    "rope-llama3",
    "rope-yarn",
    "mistral-window",
    "qwen2-14-heads",
    "qwen3",
    "internlm2-dynamic-bias",
]


def compare(rank_pool: RankPool, oracle: Oracle, collectives: str) -> None:
    oracle.check(rank_pool.run(oracle.path, [oracle.greedy_requests()], collectives).completions)


@pytest.mark.parametrize("name", slow_except((name for name in NAMES if name not in OTHER_FILES), *QUICK))
def test_same_tokens_and_logits(rank_pool: RankPool, oracles: Oracles, name: str) -> None:
    compare(rank_pool, oracles(name), "local")


@pytest.mark.parametrize("rank_pool", [1, 2], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize("name", slow_except(OTHER_FILES, "rope-llama3-older"))
def test_same_tokens_and_logits_from_other_files(rank_pool: RankPool, oracles: Oracles, name: str) -> None:
    compare(rank_pool, oracles(name), "local")


@pytest.mark.parametrize("rank_pool", TP_SIZES[1:], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize("name", slow_except(OVER_GLOO, "qwen3"))
def test_same_tokens_and_logits_over_gloo(rank_pool: RankPool, oracles: Oracles, name: str) -> None:
    compare(rank_pool, oracles(name), "gloo")


@pytest.mark.parametrize("rank_pool", [1, 2], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize(
    "name", slow_except(["llama-biases", "mistral-window", "qwen2-14-heads", "qwen3"], "mistral-window")
)
def test_same_tokens_and_logits_without_kernels(rank_pool: RankPool, oracles: Oracles, name: str) -> None:
    oracle = oracles(name)
    settings = {"rtp_cpu_kernels": "off"}
    oracle.check(rank_pool.run(oracle.path, [oracle.greedy_requests()], "local", **settings).completions)


@pytest.mark.parametrize(
    "name", slow_except(["llama-biases", "llama-tied", "qwen2-14-heads", "qwen3", "internlm2"], "qwen2-14-heads")
)
@pytest.mark.usefixtures("without_kernels")
def test_same_tokens_and_logits_from_prepacked_weights(oracles: Oracles, name: str) -> None:
    """Without kernels large weights are prepacked. Those here are small, so the minimum size is lowered."""
    oracle = oracles(name)
    with mock.patch("rtp_llm.kernels.linear_methods.MIN_PREPACKED_ELEMENTS", 1):
        engine = drive.make_single_rank_engine(oracle.path)
    oracle.check(drive.run(engine, oracle.greedy_requests()))
