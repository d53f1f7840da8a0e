"""Triton kernels as compiled for NVIDIA chips (PTX), run on a CPU and checked access by access."""
