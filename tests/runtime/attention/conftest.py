"""These tests run interpreted kernels too, with the same matmul as tests/kernels."""

from tests.kernels.conftest import rows_of_a_dot_do_not_depend_on_each_other

__all__ = ["rows_of_a_dot_do_not_depend_on_each_other"]
