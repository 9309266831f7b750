"""What only a GPU can measure: whether the kernels are right, and how close they come to its memory bandwidth.

A decoding step reads every weight, key and value once, so its time is bytes / bandwidth: 3.6 GB of 4-bit weights at 4.3
TB/s take 0.84 ms, for one row as for six. A kernel is good when it comes close to that time and stays there as rows are
added. So each time is reported with the bytes that had to move and the measured bandwidth of a copy on this device.

    PYTHONPATH=.:kernels python scripts/gpu_suite                                # all sections, about 20 minutes
    PYTHONPATH=.:kernels python scripts/gpu_suite --section correctness w4a16
    PYTHONPATH=.:kernels python scripts/gpu_suite --dry                          # tiny shapes, no figures, no GPU

It needs a CUDA device (compute capability 8.0 or more), torch, triton, transformers and this checkout. A kernel whose
results are wrong is not timed. Each section is written to one JSON file as it ends, with its time and provenance. Exit
code 1: a check failed.

Each section is a `suite.Section` in a file of its own; `main.SECTIONS` lists them in the order in which they run.
"""
