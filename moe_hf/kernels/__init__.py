"""Kernels of the experts: with ATen's calls on the CPU, in Triton on CUDA."""
