"""Every family and rope variant says what transformers says: the same greedy tokens, and logits within 1e-4."""

from unittest import mock

import pytest

from rtp_llm.contract.request import Request
from tests.model import drive
from tests.model.checkpoints import CASES
from tests.model.conftest import Oracles
from tests.model.drive import Outcomes, greedy
from tests.model.oracle import NEW_TOKENS, Oracle
from tests.model.rank_pool import RankPool

NAMES = [case.name for case in CASES]
# The same mathematics as a case without that suffix, from other files: what ranks do with it is no different.
OTHER_FILES = [
    "llama-tied-older-sharded",
    "rope-linear-older",
    "rope-dynamic-older",
    "rope-llama3-older",
]
# Each family and each kind of rope. Between ranks of one machine gloo only forms the group, and shared memory does the
# sums, which is much faster; this is the way between machines.
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


def requests(oracle: Oracle) -> list[Request]:
    return [greedy(a.prompt, NEW_TOKENS, id=str(i)) for i, a in enumerate(oracle.answers)]


def check(oracle: Oracle, outcomes: Outcomes) -> None:
    for index, answer in enumerate(oracle.answers):
        answer.check(outcomes[str(index)].tokens, outcomes[str(index)].logits)


def compare(gang: RankPool, oracle: Oracle, collectives: str) -> None:
    check(oracle, gang.run(oracle.path, [requests(oracle)], collectives).outcomes)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHER_FILES])
def test_same_tokens_and_logits(gang: RankPool, oracles: Oracles, name: str) -> None:
    compare(gang, oracles(name), "local")


@pytest.mark.parametrize("gang", [1, 2], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize("name", OTHER_FILES)
def test_same_tokens_and_logits_from_other_files(gang: RankPool, oracles: Oracles, name: str) -> None:
    compare(gang, oracles(name), "local")


@pytest.mark.parametrize("gang", [2, 3, 4], ids="tp{}".format, indirect=True)
@pytest.mark.parametrize("name", OVER_GLOO)
def test_same_tokens_and_logits_over_gloo(gang: RankPool, oracles: Oracles, name: str) -> None:
    compare(gang, oracles(name), "gloo")


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "qwen2-14-heads", "qwen3", "internlm2"])
def test_same_tokens_and_logits_from_packed_weights(oracles: Oracles, name: str) -> None:
    """On CPU large weights are laid out anew at load; these checkpoints are too small for that, unless told so."""
    oracle = oracles(name)
    with mock.patch("rtp_llm.kernels.prepacked.MIN_ELEMENTS", 1):
        engine = drive.alone(oracle.path)
    check(oracle, drive.run(engine, requests(oracle)))
