"""Compares the README's settings and exit codes with the code."""

from pathlib import Path

from rtp_llm.config import table_markdown
from rtp_llm.errors import ExitCode

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_settings_table_is_current() -> None:
    """To regenerate it: `python -c 'from rtp_llm.config import table_markdown as t; print(t())'`"""
    table = README.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert table == table_markdown()


def test_every_exit_code_is_documented() -> None:
    documented = {line.split("|")[1].strip() for line in README.splitlines() if line.startswith("| ")}
    assert {str(int(code)) for code in ExitCode if code != ExitCode.DOCTOR} <= documented
