"""The container runtimes that the doctor distinguishes."""

from enum import StrEnum


class Runtime(StrEnum):
    """The container runtime of this process. Fixes are printed in its syntax."""

    DOCKER = "docker"
    COMPOSE = "compose"
    KUBERNETES = "kubernetes"
    HOST = "host"
