"""The command `rtp-llm-bench`: measures servers and engines, compares them, draws plots of the results, and writes
checkpoints with random weights.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rtp_llm.bench.bound import PRECISIONS, ModelCost, Probe, read_spec
from rtp_llm.bench.campaign import Campaign, Case, environment
from rtp_llm.bench.catalogue import DEFAULT_NAMES, AbsentError, Catalogue, TargetName, weight_precision
from rtp_llm.bench.checkpoint import SHAPES, write_checkpoint
from rtp_llm.bench.http_client import Endpoint
from rtp_llm.bench.report import Report, TargetInfo, compare, table
from rtp_llm.bench.summary import Slo
from rtp_llm.bench.target import Target, UrlTarget
from rtp_llm.bench.worker_process import WorkerError
from rtp_llm.bench.workload import WORKLOADS, Workload, find_workload
from rtp_llm.config import load as load_config
from rtp_llm.errors import ConfigError, FatalError

TABLE_CASES = {
    case.name: case
    for case in (
        Case("c1", WORKLOADS["chat"], requests=2, concurrency=1),
        Case("c16", Workload("128/64", ((128, 64),)), requests=32, concurrency=16),
        Case("c32", Workload("128/64", ((128, 64),)), requests=64, concurrency=32),
        Case("prefill", Workload("1024/1", ((1024, 1),)), requests=3, concurrency=1),
        Case("c1-8k", Workload("8192/64", ((8192, 64),)), requests=1, concurrency=1),
        # All streams of a closed loop start at once: with two requests each, half of the requests are that burst.
        Case("c16-long", Workload("128/64", ((128, 64),)), requests=96, concurrency=16),
        Case("c32-long", Workload("128/64", ((128, 64),)), requests=192, concurrency=32),
        Case("mixed", WORKLOADS["mixed"], requests=32, concurrency=16),
    )
}
DEFAULT_CASES = ("c1", "c16", "c32", "prefill")
UNKNOWN_VOCABULARY = 32000  # tokens that every model with a URL is taken to have


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0; 1 if a request or a target failed; or that of a fatal error."""
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except FatalError as error:
        print(f"rtp-llm-bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rtp-llm-bench", description="Measures a server and compares it with others.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="measure an OpenAI-compatible server that runs")
    serve.add_argument("--url", required=True, help="http://HOST:PORT")
    serve.add_argument("--model", required=True, help="its name in requests")
    serve.add_argument("--api-key", default="", help="of the server, if it wants one")
    serve.add_argument("--prompts", choices=("ids", "text"), default="ids", help="how prompts are sent (default ids)")
    serve.add_argument("--checkpoint", type=Path, help="its folder, if it is on this machine: for the bound")
    serve.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of its weights: for the bound")
    _add_load(serve)
    serve.set_defaults(run=_serve)

    offline = commands.add_parser("offline", help="measure our engine without HTTP")
    offline.add_argument("checkpoint", type=Path)
    offline.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine")
    _add_load(offline)
    offline.set_defaults(run=_offline)

    comparison = commands.add_parser("table", help="compare our server with the peers that are installed, in turns")
    comparison.add_argument("--checkpoint", type=Path, help="folder of a model; default: a random one of --shape")
    comparison.add_argument("--shape", default="qwen2.5-0.5b", help=f"{', '.join(SHAPES)}; default qwen2.5-0.5b")
    comparison.add_argument("--targets", type=_names, default=DEFAULT_NAMES, help=f"default: {','.join(DEFAULT_NAMES)}")
    comparison.add_argument("--cases", type=_names, default=DEFAULT_CASES, help=f"of {','.join(TABLE_CASES)}")
    comparison.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="where peers are looked for, before this one",
    )
    comparison.add_argument("--folder", type=Path, default=Path("build/bench"), help="for weights, logs and the report")
    _add_output(comparison)
    comparison.set_defaults(run=_table)

    checkpoint = commands.add_parser("checkpoint", help="write a checkpoint with random weights")
    checkpoint.add_argument("folder", type=Path)
    checkpoint.add_argument("--shape", default="qwen2.5-0.5b", help=f"{', '.join(SHAPES)}; default qwen2.5-0.5b")
    checkpoint.add_argument("--seed", type=int, default=0)
    checkpoint.set_defaults(run=_checkpoint)

    comparing = commands.add_parser("compare", help="compare two reports")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(run=_compare)

    plotting = commands.add_parser("plot", help="draw a report as PNG and SVG; needs matplotlib")
    plotting.add_argument("report", type=Path)
    plotting.add_argument("folder", type=Path)
    plotting.set_defaults(run=_plot)
    return parser


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", default="chat", help=f"{', '.join(WORKLOADS)}; default chat")
    parser.add_argument("--input", type=int, help="tokens of each prompt, instead of a workload")
    parser.add_argument("--output", type=int, help="tokens of each answer, instead of a workload")
    parser.add_argument("--concurrency", type=_numbers, default=(1,), help="requests at a time, such as 1,16,32")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="requests per second (Poisson), instead of --concurrency"
    )
    parser.add_argument("--requests", type=int, help="default: twice the concurrency, at least 4; with --rate 64")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=1, help="how often each case is measured (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--slo-ttft", type=float, default=1.0, help="seconds to the first token, for goodput (default 1)"
    )
    parser.add_argument("--slo-itl", type=float, default=0.1, help="mean seconds per further token (default 0.1)")
    parser.add_argument("--json", type=Path, help="file of the report")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _checkpoint(args: argparse.Namespace) -> int:
    write_checkpoint(args.folder, args.shape, args.seed)
    return 0


def _compare(args: argparse.Namespace) -> int:
    print(compare(Report.read(args.before), Report.read(args.after)))
    return 0


def _plot(args: argparse.Namespace) -> int:
    if not importlib.util.find_spec("matplotlib"):
        raise ConfigError("plots need matplotlib: pip install 'rtp-llm[bench]'")
    from rtp_llm.bench.plots import draw

    print(*draw(Report.read(args.report), args.folder), sep="\n")
    return 0


def _serve(args: argparse.Namespace) -> int:
    endpoint = Endpoint(args.url, args.model, args.api_key, args.prompts == "text")
    target = UrlTarget("server", endpoint)
    costs, vocab_size = {}, UNKNOWN_VOCABULARY
    if args.checkpoint:
        costs = {target.name: ModelCost.of(args.checkpoint, PRECISIONS[args.precision])}
        vocab_size = vocabulary(args.checkpoint)
    return _measure(args, _cases(args), [target], Report(environment(sys.argv)), costs, vocab_size)


def _offline(args: argparse.Namespace) -> int:
    pairs = [pair.partition("=") for pair in args.env]
    settings = {key: value for key, _, value in pairs}
    config = load_config([], settings).config
    precision = (config.quantization or config.act_type or "bf16").lower()
    name = TargetName("ours-" + precision, "offline", precision, settings)
    with tempfile.TemporaryDirectory() as folder:
        target = Catalogue(args.checkpoint, (), Path(folder)).make(name)
        costs = {target.name: ModelCost.of(args.checkpoint, PRECISIONS[precision])}
        report = Report(environment(sys.argv))
        return _measure(args, _cases(args), [target], report, costs, vocabulary(args.checkpoint))


def _table(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.cases if name not in TABLE_CASES]:
        raise ConfigError(f"--cases {','.join(unknown)}: unknown; allowed: {','.join(TABLE_CASES)}")
    names = [TargetName.parse(name) for name in args.targets]
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or args.folder / args.shape
    if not (checkpoint / "model.safetensors").exists() and not args.checkpoint:
        write_checkpoint(checkpoint, args.shape)
    catalogue = Catalogue(checkpoint, (*args.peer_python, sys.executable), args.folder)
    report = Report(environment(sys.argv))
    targets, costs = [], {}
    for name in names:
        try:
            targets.append(catalogue.make(name))
            costs[name.text] = ModelCost.of(checkpoint, PRECISIONS[weight_precision(name)])
        except AbsentError as error:
            report.absent[name.text] = str(error)
            print(f"{name.text}: absent: {error}", file=sys.stderr)
    args.json = args.json or args.folder / "report.json"
    cases = [TABLE_CASES[name] for name in args.cases]
    return _measure(args, cases, targets, report, costs, vocabulary(checkpoint))


def _measure(
    args: argparse.Namespace,
    cases: Sequence[Case],
    targets: Sequence[Target],
    report: Report,
    costs: dict[str, ModelCost],
    vocab_size: int,
) -> int:
    """Runs a campaign, saves the report after each run, and prints the table.

    Returns the exit code: 1 if a request failed or a target did not start.
    """
    campaign = Campaign(cases, args.rounds, vocab_size, costs, Slo(args.slo_ttft, args.slo_itl), args.seed)
    report.cases.extend(cases)
    with ExitStack() as stack:
        started = []
        for target in targets:
            try:
                started.append(stack.enter_context(target))
                report.targets[target.name] = TargetInfo(target.description, target.start_seconds)
            except WorkerError as error:
                report.absent[target.name] = f"did not start: {error}"
        probe = stack.enter_context(Probe()) if costs else None
        for run, rates in campaign.run(started, probe):
            report.add(run, rates)
            if args.json:
                report.save(args.json)
    print(table(report))
    errors = [request["error"] for run in report.runs for request in run.requests if request["error"]]
    for reason, count in Counter(errors).items():
        print(f"rtp-llm-bench: {count} requests failed: {reason}", file=sys.stderr)
    return 1 if errors or len(started) < len(targets) else 0


def _cases(args: argparse.Namespace) -> list[Case]:
    workload = find_workload(args.workload, args.input, args.output)
    if args.rate:
        return [Case(f"{workload.name} {args.rate}/s", workload, args.requests or 64, rate=args.rate)]
    return [
        Case(f"{workload.name} c{number}", workload, args.requests or max(4, 2 * number), number)
        for number in args.concurrency
    ]


def vocabulary(checkpoint: Path) -> int:
    """Returns the number of token ids that random prompts may contain: 99 % of the checkpoint's vocabulary, because the
    last ids are often special tokens.
    """
    return read_spec(checkpoint).vocab_size * 99 // 100
