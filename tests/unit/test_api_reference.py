"""docs/api.md, which is generated from the schemas."""

from pathlib import Path

import rtp_llm
from rtp_llm.api.app import BODY_MODELS
from rtp_llm.api.fields import REFUSALS
from rtp_llm.api.reference import markdown

MANUAL = Path(rtp_llm.__file__).parents[1] / "docs/api.md"


def test_the_manual_is_current() -> None:
    """To regenerate it: `python -m rtp_llm.api.reference > docs/api.md`"""
    assert MANUAL.read_text() == markdown()


def test_the_manual_names_every_field() -> None:
    text = MANUAL.read_text()
    fields = [field.alias or name for model in BODY_MODELS for name, field in model.model_fields.items()]
    assert [name for name in (*fields, *REFUSALS) if f"`{name}`" not in text] == []
    links = {part.split(")")[0] for part in text.split("](#")[1:]}
    headings = {line[3:].lower().replace(" ", "-").replace(".", "") for line in text.splitlines() if line[:3] == "## "}
    assert links <= headings
