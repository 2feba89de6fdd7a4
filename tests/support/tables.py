"""Tables of priorities."""

import torch

from per_td.priorities.table import PriorityTable

ALPHA, EPS = 0.37, 0.01


def table(capacity=8, device="cpu", **settings) -> PriorityTable:
    settings = {
        "alpha": ALPHA,
        "eps": EPS,
        "draw": "independent",
        "method": "auto",
        "weight_normalization": "batch",
        "new_priority": "buffer_max",
        **settings,
    }
    return PriorityTable(capacity, device=torch.device(device), **settings)
