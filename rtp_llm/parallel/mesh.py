"""The mesh: this rank's coordinates in the tensor, expert, pipeline and data-parallel dimensions of the gang."""

from dataclasses import dataclass, field

from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.group import Communicator, Group, SingleRankGroup
from rtp_llm.parallel.plan import Plan


class MeshAxis(Group):
    """One dimension of the mesh of ranks, such as tensor parallelism: the ranks that differ from this rank in this
    dimension only.

    size: number of these ranks, this one included. rank: this one's index among them.

    Layers keep one axis object while communicators come and go: after the loss of a rank, the ranks form a new
    communicator, and `bind` gives it to the axis. While an axis of several ranks has no communicator, its collectives
    raise CommunicationError.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._communicator: Communicator | None = None
        self.unbind()

    def bind(self, communicator: Communicator) -> None:
        assert (communicator.rank, communicator.size) == (self.rank, self.size)
        self._communicator = communicator

    def unbind(self) -> None:
        self._communicator = SingleRankGroup() if self.size == 1 else None

    @property
    def communicator(self) -> Communicator:
        """Returns the current communicator of these ranks. Raises CommunicationError if there is none."""
        if self._communicator is None:
            raise CommunicationError(
                f"rank {self.rank} of {self.size} has no communicator now: a rank is lost or has not joined"
            )
        return self._communicator

    @property
    def wait_seconds(self) -> float | None:
        return self.communicator.wait_seconds

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.communicator.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return self.communicator.gather(tensor)

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self.communicator.broadcast(tensor)

    def min(self, value: int) -> int:
        return self.communicator.min(value)

    def check_aborted(self) -> None:
        self.communicator.check_aborted()


@dataclass(frozen=True)
class Mesh:
    """The place of one rank among all ranks, in four dimensions: tensor, expert, pipeline and data parallelism."""

    tp: MeshAxis
    ep: MeshAxis = field(default_factory=MeshAxis)
    pp: MeshAxis = field(default_factory=MeshAxis)
    dp: MeshAxis = field(default_factory=MeshAxis)

    @classmethod
    def of(cls, plan: Plan, rank: int) -> "Mesh":
        """Returns the mesh of the world rank `rank`. Adjacent ranks are in the same tensor-parallel group."""
        dp_rank, tp_rank = divmod(rank, plan.tp_size)
        return cls(MeshAxis(tp_rank, plan.tp_size), dp=MeshAxis(dp_rank, plan.dp_size))
