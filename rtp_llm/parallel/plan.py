"""The plan: the ranks of this part, the addresses of all parts and the purpose of each port.

start_server, the main process of a part, makes it from the settings and the member list (the address of each part). The
other processes read it from part.json.
"""

from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

from rtp_llm.config import MIN_START_PORT, Config
from rtp_llm.errors import ConfigError
from rtp_llm.parallel.members import Member, read_members

_inconsistent = partial(ConfigError, check="C-01")
# Offsets below part 0's START_PORT, in a range that upstream rtp-llm also reserves.
RENDEZVOUS_PORT_OFFSET, STEP_PORT_OFFSET, TORCH_STORE_PORT_OFFSET = 1, 2, 11
# Offset above the START_PORT of each part.
DOCTOR_PORT_OFFSET = 3


@dataclass(frozen=True)
class PlannedPort:
    """A TCP port on which a part (container) listens.

    `host`: the address to listen on. For HTTP that of the setting HOST; for other ports all addresses ("0.0.0.0"), or
    if the gang has a single part, the loopback address.
    """

    port: int
    purpose: str
    host: str = "0.0.0.0"


@dataclass(frozen=True)
class Plan:
    """The layout of the gang (all parts, that is containers, of one server), and which part this is. Ranks are 0 …
    world_size-1 over all parts; rank = part x local_world_size + local rank.
    """

    members: tuple[Member, ...]
    part: int
    tp_size: int
    world_size: int
    local_world_size: int
    start_port: int
    port_stride: int  # ports reserved per local rank (WORKER_INFO_PORT_NUM)
    device: str  # "cpu" or "cuda"
    http_host: str = ""  # HOST

    @property
    def first_rank(self) -> int:
        return self.part * self.local_world_size

    @property
    def ranks(self) -> range:
        """Returns the world ranks of this part."""
        return self.ranks_of(self.part)

    @property
    def dp_size(self) -> int:
        """Returns the number of data-parallel groups; each holds a whole copy of the model on `tp_size` ranks."""
        return self.world_size // self.tp_size

    @property
    def num_parts(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def leader(self) -> Member:
        return self.members[0]

    @property
    def is_multi_part(self) -> bool:
        return self.num_parts > 1

    def ranks_of(self, part: int) -> range:
        """Returns the world ranks of a part."""
        return range(part * self.local_world_size, (part + 1) * self.local_world_size)

    def member(self, part: int) -> Member | None:
        """Returns the entry of a part in the member list; None if its address is not configured."""
        return next((m for m in self.members if m.index == part), None)

    def describe_part(self, part: int) -> str:
        """Returns a text such as `part1 (10.0.0.2:20000, ranks 2-3)`.

        Omits an unknown address: with LEADER_ADDRESS, the plan knows only that of part 0.
        """
        first = part * self.local_world_size
        last = first + self.local_world_size - 1
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        member = self.member(part)
        return f"part{part} ({member.ip}:{member.port}, {ranks})" if member else f"part{part} ({ranks})"

    def leader_port(self, offset: int) -> int:
        """Returns the port of part 0 that is `offset` below its START_PORT. `offset`: RENDEZVOUS_PORT_OFFSET,
        STEP_PORT_OFFSET or TORCH_STORE_PORT_OFFSET, for the three services that only part 0 has.
        """
        return self.leader.port - offset

    def ports(self, member: Member) -> list[PlannedPort]:
        """Returns all ports on which a part listens, the HTTP port first. `member`: its entry in the member list."""
        host = "0.0.0.0" if self.is_multi_part else "127.0.0.1"
        ports = [PlannedPort(member.port, "HTTP (START_PORT)", self.http_host)]
        below = {"rendezvous": RENDEZVOUS_PORT_OFFSET} if member.index == 0 else {}
        if member.index == 0 and self.world_size > 1:
            below |= {"steps": STEP_PORT_OFFSET, "torch.distributed": TORCH_STORE_PORT_OFFSET}
        for purpose, offset in below.items():
            ports.append(PlannedPort(member.port - offset, f"{purpose} (START_PORT - {offset})", host))
        if self.is_multi_part:
            ports.append(PlannedPort(member.port + DOCTOR_PORT_OFFSET, f"doctor (START_PORT + {DOCTOR_PORT_OFFSET})"))
        return ports

    def local_ports(self) -> list[PlannedPort]:
        """Returns all ports on which this part listens. Needs no member list: LEADER_ADDRESS suffices."""
        return self.ports(self.member(self.part) or Member(self.part, f"part{self.part}", "", self.start_port))

    def reserved_ports(self, member: Member) -> range:
        """Returns the range of ports that a part has for itself: other parts with the same IP address may not use them.
        `member`: the part's entry in the member list.
        """
        below = TORCH_STORE_PORT_OFFSET if member.index == 0 else 0
        return range(member.port - below, member.port + self.port_stride * self.local_world_size)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the values of the plan that must be equal on all parts, for comparison: {"plan.tp_size": 2, …,
        "members.part0": "x_part0 10.0.0.1:10000", …}.
        """
        shared = asdict(self)
        for name in ("part", "start_port", "http_host", "members"):
            del shared[name]
        # With LEADER_ADDRESS alone each part may have a different name or address for the leader.
        listed = self.members if len(self.members) == self.num_parts else ()
        # Another part than 0 may come back under another address: no part connects to it.
        members = {
            f"members.part{m.index}": f"{m.name} {m.ip}:{m.port}" if m.index == 0 else f"{m.name} :{m.port}"
            for m in listed
        }
        return {f"plan.{name}": value for name, value in shared.items()} | members

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        return cls(**{**data, "members": tuple(Member(**m) for m in data["members"])})


def make_plan(config: Config, gpus: int) -> Plan:
    """Returns the plan. Checks that the settings are consistent. `gpus`: number of visible GPUs on this machine.

    Raises ConfigError, which names the settings, their values and the allowed ones.
    """
    device = config.rtp_device or ("cuda" if gpus else "cpu")
    _check_quantization(config, device)
    world, tp = _world_and_tp_size(config)
    members = read_members(config)
    local = _local_world_size(config, world, gpus if device == "cuda" else 0, len(members))
    if device == "cuda" and local > gpus:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={local}: this machine has {gpus} visible GPUs; allowed: at most {gpus}", check="M-02"
        )
    part = _part_index(config, world, local, tp)
    parts = world // local
    if members and len(members) != parts:
        raise _inconsistent(
            f"the member list has {len(members)} members, but WORLD_SIZE={world} / LOCAL_WORLD_SIZE={local} is {parts};"
            f" allowed: {parts} members, _part0 to _part{parts - 1}"
        )
    members = members or _default_members(config, parts)
    stride = config.worker_info_port_num
    plan = Plan(members, part, tp, world, local, config.start_port, stride, device, config.host)
    _check_ports(plan)
    return plan


def _check_quantization(config: Config, device: str) -> None:
    """Raises ConfigError if weights cannot be quantized on this device, or if two settings contradict each other."""
    older = {"INT8_MODE": "1" if config.int8_mode else "", "WEIGHT_TYPE": config.weight_type}
    settings = {name: value for name, value in ({"QUANTIZATION": config.quantization} | older).items() if value}
    text = ", ".join(f"{name}={value}" for name, value in settings.items())
    if settings and device == "cuda":
        raise ConfigError(
            f"{text}: weights are quantized on CPU only; allowed on a GPU: leave it unset, or set RTP_DEVICE=cpu",
            check="M-14",
            names=tuple(settings),
        )
    if len(settings) > 1 and config.weight_quantization != "INT8":
        raise ConfigError(f"{text}: these contradict each other; allowed: one of them", check="M-14")


def check_address(plan: Plan, addresses: set[str]) -> str | None:
    """Returns a warning if this part's address in the plan is not one of the machine's `addresses`; otherwise None.

    Raises ConfigError if the machine has another part's address: then WORLD_RANK or this part's address in the member
    list is wrong.
    """
    member = plan.member(plan.part)
    if member is None or member.ip in addresses or not member.ip.replace(".", "").isdigit():
        return None
    local = [m for m in plan.members if m.ip in addresses]
    if local:
        # Another part of this machine would need another port, so its own port shows whose place this part takes.
        same_port = [m for m in local if m.port == plan.start_port]
        advice = f"correct the address of {member.name!r} in the list"
        if same_port:
            advice = f"set WORLD_RANK={same_port[0].index * plan.local_world_size}, or {advice}"
        raise _inconsistent(
            f"WORLD_RANK={plan.first_rank} means member {member.name!r}, but {member.ip} is not an address of this"
            f" machine, which has {local[0].ip} of member {local[0].name!r}; {advice}",
            fix=advice,
        )
    return (
        f"member {member.name!r} is this part, but no network interface of this machine has {member.ip};"
        " this is correct only behind NAT"
    )


def _world_and_tp_size(config: Config) -> tuple[int, int]:
    world, tp, dp = config.world_size, config.tp_size, config.dp_size
    if dp != 1:
        raise _inconsistent(f"DP_SIZE={dp}: data-parallel groups are not supported yet; allowed: 1")
    tp = tp or (world // dp if world else 1)
    world = world or tp * dp
    if world != tp * dp:
        raise _inconsistent(
            f"WORLD_SIZE={world} is not TP_SIZE={tp} x DP_SIZE={dp} = {tp * dp};"
            f" set WORLD_SIZE={tp * dp}, or TP_SIZE={world // dp}",
            fix=f"set WORLD_SIZE={tp * dp}, or TP_SIZE={world // dp}",
        )
    return world, tp


def _local_world_size(config: Config, world: int, gpus: int, members: int) -> int:
    """Returns LOCAL_WORLD_SIZE, by default min(GPUs, WORLD_SIZE), or WORLD_SIZE on a machine without GPUs."""
    local = config.local_world_size or (min(gpus, world) if gpus else world)
    if local > world or world % local:
        allowed = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise _inconsistent(f"WORLD_SIZE={world} is not a multiple of LOCAL_WORLD_SIZE={local}; allowed: {allowed}")
    if not config.local_world_size and members > 1 and world // local != members:
        raise _inconsistent(
            f"the member list has {members} members, but WORLD_SIZE={world} with the default"
            f" LOCAL_WORLD_SIZE={local} needs {world // local}; set LOCAL_WORLD_SIZE={max(1, world // members)}",
            fix=f"set LOCAL_WORLD_SIZE={max(1, world // members)}",
        )
    return local


def _part_index(config: Config, world: int, local: int, tp: int) -> int:
    rank = config.world_rank
    if rank is None and config.world_index is not None:
        rank = config.world_index * local
    elif rank is not None and config.world_index is not None and rank != config.world_index * local:
        raise _inconsistent(
            f"WORLD_RANK={rank} (this part's first rank) and WORLD_INDEX={config.world_index} (this part's number)"
            f" differ: part {config.world_index} begins with rank {config.world_index * local}; set one of the two"
        )
    if rank is None:
        rank = config.tp_rank or 0
    if rank >= world or rank % local:
        allowed = ", ".join(str(r) for r in range(0, world, local))
        raise _inconsistent(
            f"WORLD_RANK={rank}: must be the part's number x LOCAL_WORLD_SIZE={local}, below WORLD_SIZE={world};"
            f" allowed: {allowed}"
        )
    if config.tp_rank is not None and config.tp_rank != rank % tp:
        raise _inconsistent(
            f"TP_RANK={config.tp_rank}: WORLD_RANK={rank} means TP_RANK={rank % tp}; leave TP_RANK unset"
        )
    return rank // local


def _default_members(config: Config, parts: int) -> tuple[Member, ...]:
    if config.leader_address:
        return (Member(0, "leader_part0", config.leader_address, config.start_port),)
    if parts > 1:
        raise _inconsistent(
            f"WORLD_SIZE / LOCAL_WORLD_SIZE is {parts} parts, but no member list is given;"
            " set DISTRIBUTE_CONFIG_FILE, GANG_CONFIG_STRING, JSON_GANG_PARTS or LEADER_ADDRESS"
        )
    return (Member(0, "local_part0", "127.0.0.1", config.start_port),)


def _check_ports(plan: Plan) -> None:
    for member in plan.members:
        if member.index == plan.part and member.port != plan.start_port:
            advice = f"set START_PORT={member.port}, or change the member's port"
            others = [m for m in plan.members if m.port == plan.start_port]
            if len(others) == 1:  # probably WORLD_RANK is missing
                rank = others[0].index * plan.local_world_size
                advice = f"set WORLD_RANK={rank} if this is {others[0].name!r}, or {advice}"
            raise _inconsistent(
                f"START_PORT={plan.start_port}, but member {member.name!r} of this part (WORLD_RANK={plan.first_rank})"
                f" has port {member.port}; {advice}",
                fix=advice,
            )
        last_port = member.port + plan.port_stride * plan.local_world_size - 1
        if member.port < (MIN_START_PORT if member.index == 0 else 1024) or last_port > 65535:
            raise ConfigError(
                f"member {member.name!r}: port {member.port} needs the ports {_describe_reserved_ports(plan, member)};"
                f" all must lie between 1024 and 65535",
                check="N-09",
            )
    for a, b in combinations(plan.members, 2):
        if a.ip != b.ip:
            continue
        if a.port == b.port:
            raise ConfigError(
                f"members {a.name!r} and {b.name!r} are both {a.ip}:{a.port}; give each its own port", check="C-02"
            )
        if _overlap(plan, a, b):
            raise ConfigError(
                f"members {a.name!r} and {b.name!r} share {a.ip} and their reserved ports overlap:"
                f" {_describe_reserved_ports(plan, a)} and {_describe_reserved_ports(plan, b)};"
                " move one START_PORT further away",
                check="N-09",
            )


def _describe_reserved_ports(plan: Plan, member: Member) -> str:
    ports = plan.reserved_ports(member)
    return f"{ports.start}-{ports.stop - 1}"


def _overlap(plan: Plan, a: Member, b: Member) -> bool:
    ports_a, ports_b = plan.reserved_ports(a), plan.reserved_ports(b)
    return ports_a.start < ports_b.stop and ports_b.start < ports_a.stop
