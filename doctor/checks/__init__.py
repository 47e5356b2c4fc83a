"""The checks, a file per category. Importing this package registers all of them, in the order of the report."""

from doctor.checks import configuration, model, shm, limits, gpu, interconnect, network, gang, collective  # noqa: F401, I001
