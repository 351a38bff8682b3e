"""Kernels in CUDA C++, compiled by NVRTC when they are first used: what Triton does not express, or not fast enough.

packed_linear.cu   products with weights of 4 and 8 bits, up to 64 rows
pack.py            the order in which these kernels read weights
packed_linear.py   which kernel for which shape, and its launch
nvrtc.py           from source to machine code, kept between starts
driver.py          machine code to launches
"""
