"""Parses names of models on the Hugging Face hub, `org/name@revision`, and finds the commit of a downloaded model."""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class ModelName:
    """A model on a hub. `revision`: a branch, a tag or a commit; empty for the branch `main`."""

    repo: str  # org/name
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> "ModelName | None":
        """Returns the model that a setting's value `text` names as `org/name` or `org/name@revision`.

        Returns None if the value has another form, or if a file or folder with this path exists.
        """
        match, path = _NAME.fullmatch(text), Path(text)
        if match is None or path.exists() or path.is_symlink():
            return None
        return cls(match["repo"], match["revision"] or "")

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def commit_fingerprint(checkpoint: Path) -> dict[str, str]:
    """Returns {"model.commit": commit} if the checkpoint is a snapshot in the Hugging Face cache, {} otherwise.

    The parts of a gang compare this value, to find out whether all serve the same weights. It is not enough to compare
    the headers of the weight files: they can be equal in two commits with different weights.
    """
    match = _SNAPSHOT.search(str(checkpoint.absolute()))
    return {"model.commit": match["commit"]} if match else {}
