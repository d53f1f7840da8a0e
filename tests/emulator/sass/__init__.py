"""Hopper's machine code, as ptxas makes it of a kernel's PTX, run like the PTX itself."""
