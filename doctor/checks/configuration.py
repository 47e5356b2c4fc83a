"""Settings, the member list, and the plan that follows from them: judged by the server's own code."""

from doctor.check import CheckResult, Fix, Repair, Status, check, error, ok, skip, warn
from doctor.context import PLAN_VARIABLES, CheckContext
from doctor.host import is_secret
from rtp_llm.errors import ConfigError

CATEGORY = "configuration"


@check(
    "M-14",
    CATEGORY,
    "every setting has a valid value",
    symptoms=("not valid; allowed:", "ValueError: invalid literal for int() with base 10"),
)
def values(ctx: CheckContext) -> CheckResult:
    """A variable or flag has a value that its type or range does not allow. The server reads its settings with the
    same code, and refuses to start with exit code 64."""
    faults = [f for f in ctx.parsed_config.config_errors if not _service_links(f)]
    if faults:
        return error(_one_line(*faults), "values as the README's table of settings allows", _fix_values(faults))
    return ok(f"all {len(type(ctx.config).model_fields)} settings are valid")


def _fix_values(faults: list[ConfigError]) -> Fix:
    names = [name for fault in faults for name in fault.names]
    if not names:
        return Fix("correct the command line; --help lists what there is")
    return Fix("set " + ", ".join(f"{name} to an allowed value" for name in names) + ", or leave it unset")


def _service_links(fault: ConfigError) -> bool:
    return "enableServiceLinks" in str(fault)


def _one_line(*faults: ConfigError) -> str:
    return "; ".join(str(fault).replace("\n", "; ") for fault in faults)


@check(
    "N-15",
    CATEGORY,
    "no Kubernetes Service overwrites a setting",
    symptoms=("START_PORT='tcp://…': not valid", "START_PORT … appears to be a URI"),
)
def service_links(ctx: CheckContext) -> CheckResult:
    """Kubernetes gives every pod the variables <NAME>_PORT, <NAME>_SERVICE_HOST … for each Service of its namespace.
    A Service named `start` therefore sets START_PORT to tcp://10.96.0.7:80, and the server cannot start."""
    faults = [f for f in ctx.parsed_config.config_errors if _service_links(f)]
    if not faults:
        return ok("no setting holds a Service's address")
    return error(
        f"{', '.join(faults[0].names)} was set by Kubernetes for a Service",
        "settings of your own",
        Fix(
            host="rename the Service, or set the variable to a port number",
            kubernetes="set enableServiceLinks: false in the pod's spec, or rename the Service",
        ),
    )


@check(
    "M-13",
    CATEGORY,
    "no variable is one slip away from a known one",
    symptoms=("… is not a variable of this server: did you mean …?",),
)
def misspelled_variables(ctx: CheckContext) -> CheckResult:
    """A variable of an unknown name is ignored in silence: WROLD_RANK=1 leaves WORLD_RANK unset, and this machine
    takes part 0's place. A slip in a name that decides size, place, port or model is an error, elsewhere a warning."""
    slips = ctx.parsed_config.misspelled
    if not slips:
        return ok("no variable looks like a misspelt setting")
    wrong, right = (", ".join(names) for names in zip(*slips, strict=True))
    fix = Fix("\n".join(f"{meant}={_shown(ctx, given, meant)}   in place of {given}" for given, meant in slips))
    decisive = any(meant in PLAN_VARIABLES and meant not in ctx.host.environ for _, meant in slips)
    judge = error if decisive else warn
    return judge(f"no setting, and ignored: {wrong}", right, fix)


def _shown(ctx: CheckContext, given: str, meant: str) -> str:
    """The value to paste; of what may be a secret, not a letter."""
    return "…" if is_secret(given) or is_secret(meant) else ctx.host.environ.get(given, "…")


@check(
    "C-02",
    CATEGORY,
    "the member list is well-formed",
    symptoms=("get regist members failed, address is empty", "malformed JSON at line …", "no member ends in _part0"),
    needs=("M-14",),
)
def member_list(ctx: CheckContext) -> CheckResult:
    """The distribute file (or GANG_CONFIG_STRING, JSON_GANG_PARTS) names every part: `x_part0`, `x_part1` … without
    gaps, each key equal to its `name`, each with an address and a port of its own. All parts must be given the same."""
    fault = _plan_fault(ctx, "C-02")
    if fault:
        return error(
            str(fault),
            "a list of x_part0, x_part1 … that is the same on every part",
            Fix(
                host='correct the list: {"x_part0": {"name": "x_part0", "ip": "10.0.0.5", "port": 10000}, …}',
                kubernetes="correct the ConfigMap that holds the list, and restart all parts",
            ),
        )
    differing = ctx.gang.differences("members") if ctx.gang else {}
    if differing:
        lists = "  ".join(f"{part}={value}" for part, value in differing["members"].items())
        return error(f"the parts were given different lists: {lists}", "the same list", "give all parts the same file")
    plan = ctx.plan
    if plan is None or not (
        ctx.config.distribute_config_file or ctx.config.gang_config_string or ctx.config.json_gang_parts
    ):
        return skip("no member list is given: a single part, or the leader's address alone")
    return ok(f"{len(plan.members)} members, part 0 at {plan.leader.ip}:{plan.leader.port}")


def _plan_fault(ctx: CheckContext, check: str) -> ConfigError | None:
    fault = ctx.plan_result.config_error
    return fault if fault and (fault.check or "C-01") == check else None


@check(
    "C-01",
    CATEGORY,
    "sizes, rank and member list make one plan",
    symptoms=("Timed out after … seconds waiting for clients. …/… clients joined", "WORLD_RANK=…: must be the part's"),
    needs=("M-14", "C-02"),
)
def plan(ctx: CheckContext) -> CheckResult:
    """TP_SIZE, WORLD_SIZE, LOCAL_WORLD_SIZE and WORLD_RANK of all parts must tile the world exactly: WORLD_RANK is the
    part's number times LOCAL_WORLD_SIZE, WORLD_SIZE = TP_SIZE x DP_SIZE, and this part's address and START_PORT are
    those of its member. One that differs leaves the others waiting for a rank that never comes. Two with one
    WORLD_RANK are told by the number with which the doctor at each member's address answers."""
    fault = _plan_fault(ctx, "C-01")
    if fault:
        likely = ctx.plan
        hint = f"WORLD_RANK={likely.first_rank} would fit this machine" if likely and likely.is_multi_part else ""
        return error(
            str(fault),
            "WORLD_RANK = part number x LOCAL_WORLD_SIZE, WORLD_SIZE = TP_SIZE x DP_SIZE",
            hint or "set the variables that the message names",
        )
    differing = ctx.gang.differences("plan.") if ctx.gang else {}
    if differing:
        values = "; ".join(f"{k}: " + " ".join(f"{p}={v}" for p, v in d.items()) for k, d in differing.items())
        return error(
            f"the parts disagree: {values}", "the same sizes on every part", "give all parts the same settings"
        )
    misled = ctx.gang.wrong_part_links() if ctx.gang else []
    if misled:
        return error(
            "; ".join(misled),
            "each part at its own address",
            "check WORLD_RANK on the part that answers, and that the list's addresses and forwarded ports lead to it",
        )
    made = ctx.plan
    if made is None:
        return skip("because the settings leave no plan")
    return ok(
        f"TP {made.tp_size}, ranks {made.ranks.start}-{made.ranks.stop - 1} of {made.world_size} on {made.device}"
    )


@check(
    "M-02",
    CATEGORY,
    "this machine has a GPU for each of its ranks",
    symptoms=("World size (…) is larger than the number of available GPUs (…) in this node",),
    needs=("M-14", "G-01", "G-02", "G-03", "G-09"),
)
def gpus_for_ranks(ctx: CheckContext) -> CheckResult:
    """Each rank of this part needs a GPU of its own: LOCAL_WORLD_SIZE may not exceed the GPUs that CUDA shows."""
    fault = _plan_fault(ctx, "M-02")
    shown = len(ctx.gpus.visible)
    if fault:
        return error(
            str(fault),
            f"at least {ctx.local_ranks} visible GPUs",
            Fix(
                host=f"set TP_SIZE={shown}, or add parts and set LOCAL_WORLD_SIZE={shown}",
                docker=f"docker run --gpus all …, or TP_SIZE={shown}",
                compose=f"devices: [{{driver: nvidia, count: all, capabilities: [gpu]}}], or TP_SIZE={shown}",
                kubernetes=f"resources.limits: {{nvidia.com/gpu: {ctx.local_ranks}}}, or TP_SIZE={shown}",
            ),
        )
    if not ctx.on_gpu:
        return skip("the ranks run on CPU")
    return ok(f"{shown} GPUs for {ctx.local_ranks} ranks")


@check("M-15", CATEGORY, "prometheus_client keeps its numbers in memory", severity=Status.WARN, repair=Repair.CONFIG)
def multiprocess_metrics(ctx: CheckContext) -> CheckResult:
    """With PROMETHEUS_MULTIPROC_DIR set, prometheus_client writes every number to files of that folder, and reads what
    an earlier run left there: the metrics of this server would be wrong. It needs no such folder, since one process
    owns them all."""
    folder = ctx.host.environ.get("PROMETHEUS_MULTIPROC_DIR") or ctx.host.environ.get("prometheus_multiproc_dir")
    if not folder:
        return ok("PROMETHEUS_MULTIPROC_DIR is not set")
    stale = [name for name in ctx.host.list_dir(folder) if name.endswith(".db")]
    return warn(
        f"PROMETHEUS_MULTIPROC_DIR={folder} is set" + (f", with {len(stale)} files of an earlier run" if stale else ""),
        "the variable unset",
        Fix(host="unset PROMETHEUS_MULTIPROC_DIR", kubernetes="remove PROMETHEUS_MULTIPROC_DIR from the pod's env"),
    )
