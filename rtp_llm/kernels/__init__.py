"""Attention kernels behind one interface, with a torch reference that all of them are tested against."""
