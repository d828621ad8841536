"""C++ for CPUs: compiled on first use for the machine at hand, kept in a cache folder, called through ctypes.

Nothing outside ``forkkv_kernels.ops`` imports from here. Where there is no C++ compiler the ops run their references.
"""
