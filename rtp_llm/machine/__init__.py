"""Facts about this machine from the kernel and NVML: GPUs, addresses, container limits. Does not import torch."""
