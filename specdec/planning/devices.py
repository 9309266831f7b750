"""Cards by name, and how much of a card's memory tensors can take."""

from __future__ import annotations

import re

GIB = 2**30
MIB = 2**20
# MiB, as nvidia-smi shows them; drivers and error correction differ a little
CARDS_MIB = {
    "RTX 3060 12GB": 12288, "RTX 4070": 12282, "T4": 15360, "RTX 4080": 16376, "A10": 23028, "L4": 23034,
    "RTX 3090": 24576, "RTX 4090": 24564, "RTX 5090": 32607, "A100 40GB": 40960, "L40S": 46068, "RTX A6000": 49140,
    "H100": 81559, "A100 80GB": 81920, "H200": 143771, "B200": 183359,
}  # fmt: skip
CUDA_CONTEXT_BYTES = 3 * GIB // 4  # the CUDA context, kernels and cuBLAS' workspace
FRAGMENTATION = 0.05  # of the card: blocks that the allocator holds and cannot use


def usable_bytes(memory_bytes: int) -> int:
    """What tensors can take of a card's memory: the rest is for the CUDA context and fragmentation."""
    return int(memory_bytes * (1 - FRAGMENTATION)) - CUDA_CONTEXT_BYTES


def card_bytes(card: str) -> int:
    """Memory of a card of CARDS_MIB, or of a size such as 24GiB."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gib", card.strip().lower())
    if size:
        return int(float(size[1]) * GIB)
    found = [mib for name, mib in CARDS_MIB.items() if name.lower() == card.strip().lower()]
    if not found:
        raise ValueError(f"card {card!r} is unknown; give its memory as in 24GiB, or one of {', '.join(CARDS_MIB)}")
    return found[0] * MIB


def smallest_card(total_bytes: int) -> str | None:
    """The card of CARDS_MIB with the least memory that holds so many bytes; None where none does."""
    fitting = [(mib, name) for name, mib in CARDS_MIB.items() if usable_bytes(mib * MIB) >= total_bytes]
    return min(fitting)[1] if fitting else None
