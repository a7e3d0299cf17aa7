"""Samples to packed rows: who forwards what, in which row."""
