"""Attention behind one small interface, with a torch reference that every kernel is tested against."""
