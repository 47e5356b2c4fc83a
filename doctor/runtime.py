"""The container runtimes that the doctor distinguishes."""

from enum import StrEnum


class Runtime(StrEnum):
    """What runs this process; fixes are printed in its syntax."""

    DOCKER = "docker"
    COMPOSE = "compose"
    KUBERNETES = "kubernetes"
    HOST = "host"
