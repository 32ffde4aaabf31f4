"""Triton kernels. Import as `pgdpo_fast.kernels`, never by the directory name."""
