"""Ledger: the last report of each shard."""

import time

import torch

from per_td.ray.shard import Report


class Ledger:
    """The last report of every shard; a lost shard has no mass and no transitions.

    Args:
        num_shards: K.
    """

    @torch.inference_mode(False)  # whoever made it, reports change these tensors later
    def __init__(self, num_shards: int) -> None:
        self.reports: list[Report | None] = [None] * num_shards
        self.total = torch.zeros(num_shards, dtype=torch.float64, device="cpu")
        self.smallest = torch.full((num_shards,), torch.inf, dtype=torch.float64, device="cpu")
        self.heard = [-torch.inf] * num_shards
        self.living = [False] * num_shards
        self.losses = 0

    @property
    def size(self) -> int:
        """N: the number of transitions in the living shards."""
        return sum(
            report.size
            for report, lives in zip(self.reports, self.living, strict=True)
            if lives and report is not None
        )

    def note(self, shard: int, report: Report) -> bool:
        """Take up a report. True if the shard has started anew since the last one."""
        last = self.reports[shard]
        anew = last is None or last.epoch != report.epoch
        if not anew and last is not None and last.serial > report.serial and self.living[shard]:
            return False  # a later one has overtaken it
        self.reports[shard] = report
        self.total[shard] = report.total
        self.smallest[shard] = report.smallest
        self.heard[shard] = time.monotonic()
        self.living[shard] = True
        return anew

    def lose(self, shard: int) -> None:
        """Count nothing for a shard until it reports again."""
        self.losses += self.living[shard]
        self.living[shard] = False
        self.total[shard] = 0.0
        self.smallest[shard] = torch.inf

    def sum(self, name: str) -> int:
        """Sum of a counter over the last reports of all shards."""
        return sum(getattr(report, name) for report in self.reports if report is not None)
