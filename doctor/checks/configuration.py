"""Checks of settings, member list (addresses of all parts) and plan (rank layout), with the server's own code."""

from doctor import fixes
from doctor.check import CheckResult, Status, error, ok, skip, symptoms, warn
from doctor.checks.alignment import alignment
from doctor.checks.categories import configuration_check, format_differences
from doctor.context import PLAN_VARIABLES, CheckContext
from doctor.host import is_secret
from rtp_llm.config import opens_access
from rtp_llm.errors import ConfigError


@configuration_check("M-14", "every setting has a valid value")
@symptoms("not valid; allowed:", "ValueError: invalid literal for int() with base 10")
def settings_are_valid(ctx: CheckContext) -> CheckResult:
    """Fails if a variable or flag has a value that its type or range does not allow. The server parses its settings
    with the same code, and would exit with code 64."""
    errors = [e for e in ctx.parsed_config.config_errors if not _is_service_link(e)]
    if not errors:
        return ok(f"all {len(type(ctx.config).model_fields)} settings are valid")
    names = [f"{name} to an allowed value" for e in errors for name in e.names]
    actual = "; ".join(str(e).replace("\n", "; ") for e in errors)
    fix = f"set {', '.join(names)}, or leave it unset" if names else "correct the server's flags; see --help"
    return error(actual, "values that the README's table of settings allows", fix)


def _is_service_link(config_error: ConfigError) -> bool:
    """Returns whether the error is about a variable that Kubernetes sets for a Service. Such an error belongs to check
    N-15, so M-14 leaves it out."""
    return "enableServiceLinks" in str(config_error)


@configuration_check("N-15", "no Kubernetes Service overwrites a setting")
@symptoms("START_PORT='tcp://…': not valid", "START_PORT … appears to be a URI")
def no_service_links(ctx: CheckContext) -> CheckResult:
    """Kubernetes sets the variables <NAME>_PORT, <NAME>_SERVICE_HOST … in every pod for each Service of its namespace.
    A Service named `start` therefore sets START_PORT to tcp://10.96.0.7:80, and the server cannot start."""
    errors = [e for e in ctx.parsed_config.config_errors if _is_service_link(e)]
    if not errors:
        return ok("no setting holds a Service's address")
    names = ", ".join(errors[0].names)
    actual = f"{names}: set by Kubernetes to the address of a Service"
    return error(actual, "a value that you set", fixes.SERVICE_LINKS)


@configuration_check("M-13", "no variable is a misspelled setting")
@symptoms("… is not a variable of this server: did you mean …?")
def no_misspelled_variables(ctx: CheckContext) -> CheckResult:
    """A variable with an unknown name is silently ignored: WROLD_RANK=1 leaves WORLD_RANK unset, and this machine
    starts as part 0. A typo in a variable that sets size, rank, port or model is an error, as is one that leaves the
    server open: API_KEYS sets no key. Any other is a warning."""
    typos = ctx.parsed_config.misspelled
    if not typos:
        return ok("no variable is a misspelled setting")
    names, meant_names = (", ".join(names) for names in zip(*typos, strict=True))
    fix = "\n".join(f"{meant}={_public_value(ctx, name, meant)}   in place of {name}" for name, meant in typos)
    changes_plan = any(meant in PLAN_VARIABLES and meant not in ctx.host.environ for _, meant in typos)
    opens = any(opens_access(ctx.config, meant) for _, meant in typos)
    verdict = error if changes_plan or opens else warn
    return verdict(f"ignored, because it is not a setting: {names}", meant_names, fix)


def _public_value(ctx: CheckContext, name: str, meant: str) -> str:
    """Returns the value of the variable `name`, or "…" if it is unset or may be a secret."""
    return "…" if is_secret(name) or is_secret(meant) else ctx.host.environ.get(name, "…")


@configuration_check("C-02", "the member list is well-formed", needs=("M-14",))
@symptoms("get regist members failed, address is empty", "malformed JSON at line …", "no member ends in _part0")
def member_list_is_valid(ctx: CheckContext) -> CheckResult:
    """The member list (DISTRIBUTE_CONFIG_FILE, GANG_CONFIG_STRING or JSON_GANG_PARTS) names every part: `x_part0`,
    `x_part1` … without gaps, each key equal to its `name`, each with its own address and port. All parts must use the
    same list."""
    config, plan = ctx.config, ctx.plan
    config_error = _plan_error(ctx, "C-02")
    if config_error:
        expected = "a list of x_part0, x_part1 … that is the same on every part"
        return error(str(config_error), expected, fixes.MEMBER_LIST)
    differences = ctx.gang.differences("members.") if ctx.gang else {}
    if differences:
        actual = f"the parts have different member lists: {format_differences(differences)}"
        return error(actual, "the same member list on all parts", alignment(differences))
    if plan is None or not (config.distribute_config_file or config.gang_config_string or config.json_gang_parts):
        return skip("no member list is set: there is one part, or only LEADER_ADDRESS is set")
    return ok(f"{len(plan.members)} parts in the list, part 0 at {plan.leader.ip}:{plan.leader.port}")


def _plan_error(ctx: CheckContext, id: str) -> ConfigError | None:
    """Returns the error because of which the settings give no valid plan, if the check `id` reports this error; else
    None."""
    config_error = ctx.plan_result.config_error
    return config_error if config_error and (config_error.check or "C-01") == id else None


@configuration_check("C-01", "sizes, rank and member list are consistent", needs=("M-14", "C-02"))
@symptoms("Timed out after … seconds waiting for clients. …/… clients joined", "WORLD_RANK=…: must be the part's")
def plan_is_consistent(ctx: CheckContext) -> CheckResult:
    """TP_SIZE, WORLD_SIZE, LOCAL_WORLD_SIZE and WORLD_RANK of all parts must cover every rank exactly once: WORLD_RANK
    is the part's number times LOCAL_WORLD_SIZE, WORLD_SIZE = TP_SIZE x DP_SIZE, and this part's address and START_PORT
    equal those of its entry in the member list. If one part differs, the others wait for a rank that never joins.
    `rtp-llm-doctor gang` also detects two parts with the same WORLD_RANK: the doctor at each address of the list
    reports its part number."""
    config_error, plan = _plan_error(ctx, "C-01"), ctx.plan
    if config_error:
        fix = config_error.fix or "set the variables that the message names"
        if not config_error.fix and plan and plan.is_multi_part:
            fix = f"WORLD_RANK={plan.first_rank} would match this machine's address in the member list"
        expected = "WORLD_RANK = part number x LOCAL_WORLD_SIZE, WORLD_SIZE = TP_SIZE x DP_SIZE"
        return error(str(config_error), expected, fix)
    differences = ctx.gang.differences("plan.") if ctx.gang else {}
    if differences:
        actual = f"the parts have different sizes: {format_differences(differences)}"
        return error(actual, "the same sizes on every part", alignment(differences))
    wrong_parts = ctx.gang.wrong_part_links() if ctx.gang else []
    if wrong_parts:
        fix = "correct WORLD_RANK on the part that answers, or the addresses and port forwarding in the member list"
        return error("; ".join(wrong_parts), "each part at its own address", fix)
    if plan is None:
        return skip("the settings give no valid plan of ranks and addresses")
    ranks = f"{plan.ranks.start}-{plan.ranks.stop - 1} of {plan.world_size}"
    return ok(f"TP {plan.tp_size}, ranks {ranks} on {plan.device}")


@configuration_check(
    "M-02", "this machine has a GPU for each of its ranks", needs=("M-14", "G-01", "G-02", "G-03", "G-09")
)
@symptoms("World size (…) is larger than the number of available GPUs (…) in this node")
def enough_gpus_for_ranks(ctx: CheckContext) -> CheckResult:
    """Each rank of this part needs its own GPU: LOCAL_WORLD_SIZE must not exceed the number of GPUs that CUDA sees."""
    num_gpus, config_error = len(ctx.gpus.visible), _plan_error(ctx, "M-02")
    if config_error:
        fix = fixes.fewer_ranks(num_gpus, ctx.local_ranks)
        return error(str(config_error), f"at least {ctx.local_ranks} visible GPUs", fix)
    return ok(f"{num_gpus} visible GPUs for {ctx.local_ranks} ranks") if ctx.on_gpu else skip("the ranks run on CPU")


@configuration_check("M-15", "prometheus_client keeps its metrics in memory", severity=Status.WARN)
def no_multiprocess_metrics(ctx: CheckContext) -> CheckResult:
    """If PROMETHEUS_MULTIPROC_DIR is set, prometheus_client writes all values to files in that folder, and also reads
    the files of earlier runs, so the metrics of this server would be wrong. The server does not need the folder,
    because a single process has all metrics."""
    folder = ctx.host.environ.get("PROMETHEUS_MULTIPROC_DIR") or ctx.host.environ.get("prometheus_multiproc_dir")
    if not folder:
        return ok("PROMETHEUS_MULTIPROC_DIR is not set")
    num_stale = sum(name.endswith(".db") for name in ctx.host.list_dir(folder))
    stale = f", with {num_stale} files of an earlier run" if num_stale else ""
    actual = f"PROMETHEUS_MULTIPROC_DIR={folder} is set{stale}"
    return warn(actual, "PROMETHEUS_MULTIPROC_DIR unset", fixes.UNSET_MULTIPROC_DIR)
