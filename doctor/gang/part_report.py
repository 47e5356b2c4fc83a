"""The report that each part sends to the others: its settings, its identity and the results of its probes."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LinkResult:
    """What one part found when it probed the connection to another part, in one direction. Speeds in bytes/s, times in
    seconds.

    `ports`: result by port: open, refused, timeout, unreachable, reset or not_doctor. If the other part's report is
    missing, the only entry is the port of its doctor, whose result may also be protocol_error, reply_timeout or
    wrong_part. `transfer_error`: empty if the large transfers succeeded or were not tried.
    """

    ports: dict[int, str] = field(default_factory=dict)
    replied: bool = False  # the other doctor replied to a request
    protocol_error: str = ""  # message if the other doctor has another version or secret
    foreign_address: str = ""  # ip:port at which another program answers instead of the doctor
    wrong_part: str = ""  # message if the doctor of a third part answers at this address
    reply_timed_out: bool = False  # the other doctor sent a greeting but no reply
    transfer_error: str = ""
    sent_speed: float = 0.0
    received_speed: float = 0.0
    rtt: float = 0.0
    clock_offset: float = 0.0
    clock_error: float = 0.0


@dataclass
class PartReport:
    """What one part (container) tells the doctors of the others about itself.

    `facts`: values that the doctors compare between parts, by dotted name. `identity`: values that show which parts
    share a machine, a namespace or a GPU. `probing_done`: this part has probed all its links, so the report is final.
    `received_from`: numbers of the parts whose final report this part has. `has_valid_plan`: whether this part's
    settings give a valid rank layout; if not, only `problems` is meaningful and no links are probed. `links`: what this
    part found about its connection to each other part, by part number.
    """

    part: int
    name: str
    run_id: str  # random, so that a restarted part replaces its earlier report
    address: str
    start_port: int
    interface: str
    mtu: int
    facts: dict[str, str]
    identity: dict[str, Any]
    planned_ports: dict[int, str]
    ephemeral_ports: list[int]
    port_range: str
    problems: dict[str, str]  # errors of this part's own checks, by id
    listening: bool  # placeholder sockets listen on the planned ports; if False, the server may not listen yet
    has_valid_plan: bool = True
    probing_done: bool = False
    received_from: list[int] = field(default_factory=list)
    links: dict[int, LinkResult] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"part{self.part}"

    @property
    def progress(self) -> tuple[bool, int]:
        """Returns a value that increases during a run: of two reports with equal `run_id`, the larger one is newer."""
        return self.probing_done, len(self.received_from)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PartReport":
        """Returns the report in a decoded JSON object. JSON has only string keys, so part and port numbers are
        converted to int.

        Raises TypeError, KeyError, ValueError or AttributeError if the data is invalid.
        """
        links = {
            int(part): LinkResult(
                **{**link, "ports": {int(port): str(result) for port, result in link["ports"].items()}}
            )
            for part, link in data["links"].items()
        }
        ports = {int(port): str(purpose) for port, purpose in data["planned_ports"].items()}
        return cls(**{**data, "links": links, "planned_ports": ports})
