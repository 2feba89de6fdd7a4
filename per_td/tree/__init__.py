"""The wide sum tree: one memory layout, and its operations."""

from per_td.tree.extremum import ExtremumTree
from per_td.tree.forest import ForestLayout, SumForest
from per_td.tree.layout import FANOUT, Layout
from per_td.tree.sum_tree import SumTree

__all__ = ["FANOUT", "ExtremumTree", "ForestLayout", "Layout", "SumForest", "SumTree"]
