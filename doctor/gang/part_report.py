"""One part's contribution to the gang's picture: who it is, what it holds, and how it found the way to the others."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LinkResult:
    """What one part found on its way to another. Speeds in bytes/s, times in seconds.

    `ports`: outcome by port: open, refused, timeout, unreachable, reset, foreign. `blob`: what became of the large
    transfers, empty where both went through, or none was made.
    """

    ports: dict[int, str] = field(default_factory=dict)
    answered: bool = False  # the responder talked to us
    refusal: str = ""  # why the responder would not: version, secret
    foreign_address: str = ""  # the address where something that is no doctor answers in its place
    wrong_part: str = ""  # which other part answers under this one's address
    reply_timed_out: bool = False  # it greeted, and then nothing came that is longer
    transfer_error: str = ""
    sent_speed: float = 0.0
    received_speed: float = 0.0
    rtt: float = 0.0
    clock_offset: float = 0.0
    clock_error: float = 0.0


@dataclass
class PartReport:
    """`facts`: comparable values by dotted name; `identity`: what tells machines, namespaces and GPUs apart.

    `random_ports`: chosen by the kernel, as NCCL's are; `done`: it has tried every way, `seen`: the parts whose done
    rows it holds. `fit`: whether it has a plan that can be believed; else it tells its problems, and nothing is tried.
    """

    part: int
    name: str
    run_id: str  # a random id: a part that was started again is another one
    address: str
    start_port: int
    interface: str
    mtu: int
    facts: dict[str, str]
    identity: dict[str, Any]
    planned_ports: dict[int, str]
    ephemeral_ports: list[int]
    port_range: str
    problems: dict[str, str]  # what this part's own checks found: error by id
    listening: bool  # whether stand-ins listen on the planned ports, or the real ones may not be there yet
    has_valid_plan: bool = True
    probing_done: bool = False
    received_from: list[int] = field(default_factory=list)
    links: dict[int, LinkResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PartReport":
        """JSON has no integer keys. Raises TypeError, KeyError or ValueError on what is no row."""
        links = {
            int(part): LinkResult(**{**link, "ports": {int(p): str(o) for p, o in link["ports"].items()}})
            for part, link in data["links"].items()
        }
        ports = {int(port): str(purpose) for port, purpose in data["planned_ports"].items()}
        return cls(**{**data, "links": links, "planned_ports": ports})
