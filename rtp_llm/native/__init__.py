"""CPU kernels in C++, compiled once per instruction set level, and the loader that selects a level at run time."""
