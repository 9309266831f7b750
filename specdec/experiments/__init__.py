"""Experiments: configs, workloads, runs, their records, and reports of them."""
