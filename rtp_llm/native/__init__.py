"""Kernels for CPUs in C++, compiled once per level of instructions, and the loader that selects a level at run time."""
