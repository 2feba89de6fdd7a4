"""Prioritized experience replay for PyTorch, tensor-native on CPU and CUDA."""

from per_td import functional
from per_td.buffer import PrioritizedReplayBuffer
from per_td.errors import (
    AllocationError,
    CheckpointError,
    ConfigurationError,
    DiskAllocationError,
    EmptyBufferError,
    IndexRangeError,
    KernelWarning,
    PerTdError,
    PriorityError,
    SchemaError,
)
from per_td.nstep import NStepWriter
from per_td.priorities.schedules import LinearSchedule
from per_td.transitions import TransitionReplayBuffer
from per_td.tree import SumTree

__version__ = "0.2.0"

__all__ = [
    "AllocationError",
    "CheckpointError",
    "ConfigurationError",
    "DiskAllocationError",
    "EmptyBufferError",
    "IndexRangeError",
    "KernelWarning",
    "LinearSchedule",
    "NStepWriter",
    "PerTdError",
    "PrioritizedReplayBuffer",
    "PriorityError",
    "SchemaError",
    "SumTree",
    "TransitionReplayBuffer",
    "functional",
]
