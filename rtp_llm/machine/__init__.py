"""What the kernel and NVML say of this machine: devices, addresses, the limits of the container. No torch."""
