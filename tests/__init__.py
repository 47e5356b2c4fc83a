"""Makes this folder a regular package: an installed package called tests would hide a namespace package."""
