"""Kernels in Triton, a file for each op; nothing else imports triton."""
