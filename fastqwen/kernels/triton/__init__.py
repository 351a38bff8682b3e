"""Kernels for NVIDIA GPUs, in Triton. Each is tested against kernels/reference.py, on the CPU through Triton's
interpreter and on a GPU; those in Gluon (streamed.py, streamed_attention.py), which has no interpreter, are compiled on the CPU
and tested on a GPU."""
