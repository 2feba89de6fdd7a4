"""Wide trees over S groups of slots: sums of masses, and for priorities the extremes."""

from per_td.tree.sum_tree import SumTree
from per_td.tree.trees import Trees

__all__ = ["SumTree", "Trees"]
