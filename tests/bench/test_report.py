"""Reports: what is saved, shown and compared."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rtp_llm.bench.bound import Bound, MachineRates
from rtp_llm.bench.campaign import Case, Run, environment
from rtp_llm.bench.plots import draw
from rtp_llm.bench.record import Record
from rtp_llm.bench.report import Report, TargetInfo, compare, table
from rtp_llm.bench.summary import Slo, Summary
from rtp_llm.bench.workload import Workload
from rtp_llm.errors import ConfigError

CASES = (
    Case("c2", Workload("8/4", ((8, 4),)), requests=2, concurrency=2),
    Case("prefill", Workload("8/1", ((8, 1),)), requests=1, concurrency=1),
)
RATES = MachineRates(50e9, {"bf16": 500e9})


def run(case: str, target: str, round: int, seconds: float) -> Run:
    """Returns a run of one request of 8 + 4 (or 1) tokens, whose tokens come every `seconds`."""
    tokens = 4 if case == "c2" else 1
    record = Record(8, 0.0, [seconds * (number + 1) for number in range(tokens)], tokens)
    return Run(case, target, round, Summary.of([record], Slo(1.0, 0.1)), Bound(40.0, 400.0, 50.0), [record.summary()])


def report(*runs: Run) -> Report:
    targets = {name: TargetInfo("as set", 1.5) for name in ("ours-bf16", "ours-w8a8", "openvino-bf16", "openvino-int8")}
    result = Report(environment(["rtp-llm-bench", "table"]), list(CASES), targets, {"vllm-bf16": "no package vllm"})
    for one in runs:
        result.add(one, RATES)
    return result


def cells(text: str, case: str, target: str) -> dict[str, str]:
    """Returns the row of a table by column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    [row] = [row for row in rows if row[:2] == [case, target]]
    return dict(zip(rows[0], row, strict=True))


def test_a_saved_report_is_read_again(tmp_path: Path) -> None:
    saved = report(run("c2", "ours-bf16", 0, 0.1), run("prefill", "ours-bf16", 0, 0.1))
    saved.save(tmp_path / "new folder" / "report.json")
    read = Report.read(tmp_path / "new folder" / "report.json")
    assert read == saved
    assert table(read) == table(saved)


@pytest.mark.parametrize("content", ["", "[]", '{"runs": 3}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json: is not a report"):
        Report.read(tmp_path / "a.json")


def test_ratios_are_medians_of_the_rounds_and_compare_equal_bits() -> None:
    """The machine slows down from round to round, so the ratio of medians would be another."""
    runs = []
    for number, (ours, theirs) in enumerate([(0.1, 0.1), (0.2, 0.6), (0.4, 0.8)]):
        runs += [run("c2", "ours-bf16", number, ours), run("c2", "openvino-bf16", number, theirs)]
        runs += [run("c2", "ours-w8a8", number, ours / 2), run("c2", "openvino-int8", number, theirs)]
    text = table(report(*runs))
    assert cells(text, "c2", "openvino-bf16")["ours / it"] == "2.00"
    assert cells(text, "c2", "openvino-int8")["ours / it"] == "4.00"
    assert cells(text, "c2", "ours-bf16")["ours / it"] == "1.00"
    assert cells(text, "c2", "ours-bf16")["tok/s"] == "5.0"  # the median round: a token every 0.2 s


def test_a_row_shows_the_rate_that_counts_and_its_share_of_the_bound() -> None:
    text = table(report(run("c2", "ours-bf16", 0, 0.1), run("prefill", "ours-bf16", 0, 0.1)))
    decode, prefill = cells(text, "c2", "ours-bf16"), cells(text, "prefill", "ours-bf16")
    assert (decode["tok/s"], decode["bound"], decode["ITL p99"]) == ("10.0", "25%", "100.0")
    assert decode["x fair"] == "0.50"  # two streams at 10 tokens per second: one each 200 ms
    assert (prefill["tok/s"], prefill["bound"], prefill["ITL p99"]) == ("80.0", "20%", "")
    assert "vllm-bf16: absent: no package vllm" in text
    assert re.search(r"measured beside the runs: 50-50 GB/s read, 500-500 bf16", text)


def test_events_of_several_tokens_are_told() -> None:
    one = run("c2", "ours-bf16", 0, 0.1)
    several = replace(one, summary=replace(one.summary, tokens_per_event=1.25))
    assert "ours-bf16: up to 1.25 tokens per event" in table(report(several))
    assert "per event" not in table(report(one))


def test_comparison_above_one_is_better() -> None:
    before = report(run("c2", "ours-bf16", 0, 0.2), run("c2", "openvino-bf16", 0, 0.2))
    after = report(run("c2", "ours-bf16", 0, 0.1))
    text = compare(before, after)
    assert re.search(r"c2 +\| ours-bf16 +\| +5.0 \| +10.0 \| +2.00 \| +200.0 \| +100.0 \| +2.00", text)
    assert "openvino" not in text  # only one report has it


def test_plots_are_written(tmp_path: Path) -> None:
    files = draw(report(run("c2", "ours-bf16", 0, 0.1), run("prefill", "openvino-bf16", 0, 0.1)), tmp_path)
    assert {file.name for file in files} == {"rates.png", "rates.svg", "latencies.png", "latencies.svg"}
    assert all(file.stat().st_size > 1000 for file in files)
