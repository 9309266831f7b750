"""specdec's Triton kernels. Importing this imports no triton, which exists on Linux only: an op imports it when it launches."""
