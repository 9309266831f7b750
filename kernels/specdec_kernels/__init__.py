"""specdec's kernels. Importing this does not import triton, which exists on Linux only; an op imports it at launch."""
