"""Names of models in the settings, and the snapshots that stand for them."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from rtp_llm.config import Config
from rtp_llm.hub.name import ModelName, commit_fingerprint
from rtp_llm.hub.settings import localized, missing_models
from tests.hub.fake_hub import COMMIT, DEMO

OTHER_COMMIT = "b" * 40


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", ""),
        ("org/name@v1.0", "org/name", "v1.0"),
        (f"org/name@{COMMIT}", "org/name", COMMIT),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("0x-org_1/a.b-C", "0x-org_1/a.b-C", ""),
    ],
)
def test_names(text: str, repo: str, revision: str) -> None:
    name = ModelName.parse(text)
    assert name == ModelName(repo, revision)
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    ["", "name", "/models/x", "./x", "../x", "a/b/c", "org/", "org/../x", "~/x", "org/name@", "org/na me"],
)
def test_paths(text: str) -> None:
    assert ModelName.parse(text) is None


def test_what_exists_here_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert ModelName.parse("org/name")
    (tmp_path / "org" / "name").symlink_to("/nowhere")
    assert ModelName.parse("org/name") is None
    (tmp_path / "org" / "name").unlink()
    (tmp_path / "org" / "name").mkdir()
    assert ModelName.parse("org/name") is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with org/demo: the branch main at COMMIT, and another commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--demo"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for commit in (COMMIT, OTHER_COMMIT):
        shutil.copytree(DEMO, model / "snapshots" / commit)
    return tmp_path


def settings(**values: str) -> Config:
    return Config.model_validate(values)


def test_a_cached_name_is_its_snapshot(cache: Path) -> None:
    resolved = localized(settings(checkpoint_path="org/demo", tokenizer_path=f"org/demo@{OTHER_COMMIT}"))
    snapshots = cache / "models--org--demo" / "snapshots"
    assert resolved.checkpoint_path == str(snapshots / COMMIT)
    assert resolved.tokenizer_path == str(snapshots / OTHER_COMMIT)
    assert resolved.served_model_names == ("org/demo",)


def test_missing_models_are_named_once(cache: Path) -> None:
    missing = missing_models(settings(checkpoint_path="org/other@v1", tokenizer_path="org/other@v1"))
    assert missing == [ModelName("org/other", "v1")]
    assert not missing_models(settings(checkpoint_path="org/demo", tokenizer_path="/models/x"))
    config = settings(checkpoint_path="org/other")
    assert localized(config) == config


def test_parts_with_different_commits_differ(cache: Path) -> None:
    """Their headers, and so the checkpoint's digest, can be equal."""
    fingerprints = [commit_fingerprint(path) for path in (cache / "models--org--demo" / "snapshots").iterdir()]
    assert sorted(f["model.commit"] for f in fingerprints) == [COMMIT, OTHER_COMMIT]
    assert commit_fingerprint(DEMO) == {}
