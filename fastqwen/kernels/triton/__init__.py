"""Kernels for NVIDIA GPUs, in Triton. Each is tested against kernels/reference.py, on the CPU through Triton's
interpreter and on a GPU."""
