"""The device path: steps as tables in device memory, run by Triton kernels, replayed as CUDA graphs where rows only decode."""
