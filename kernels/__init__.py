"""Triton kernels and their launchers; installed as `lcf_fast.kernels`, never as a top-level `kernels`."""
