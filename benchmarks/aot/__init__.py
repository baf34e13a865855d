"""Code quality of the Triton kernels, compiled ahead of time for every architecture, on a machine without a GPU."""
