"""Wide trees: sums, and for priorities the largest and smallest, over S groups of slots."""

from per_td.tree.sum_tree import SumTree
from per_td.tree.trees import Trees

__all__ = ["SumTree", "Trees"]
