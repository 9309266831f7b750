"""No test needs a network, and none may ask one: hub look-ups end at once. Without a GPU, Triton kernels are interpreted."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
