"""A naive model of frames kept once, and games that show stacks of them."""

import numpy as np
import torch
from tensordict import TensorDict

from per_td.storage.frame_store import LOOK_BACK


class FrameOracle:
    """Frames by their bytes: which are stored, and which transitions retire."""

    def __init__(self, size, envs, capacity):
        self.size, self.envs, self.capacity = size, envs, capacity
        self.retired = 0
        self.forget()

    def forget(self):
        self.cursor = self.floor = 0
        self.numbers = {}  # of the frames of each slot
        self.recent = [[] for _ in range(self.envs)]
        self.writes = [0] * self.envs

    def write(self, slot, env, frames):
        """Write a transition with these frames (bytes)."""
        own, time, numbers = self.recent[env], self.writes[env], []
        for frame in frames:
            least = max(self.floor, self.cursor - self.size)
            for other, number, at in own[-(LOOK_BACK + len(frames)) :]:
                if other == frame and number >= least and at >= time - LOOK_BACK:
                    break
            else:
                number = self.cursor
                own.append((frame, number, time))
                self.cursor += 1
            numbers.append(number)
        self.writes[env] += 1
        self.numbers[slot] = numbers

    def retire(self):
        """Slots that retire after a write."""
        if self.cursor - self.size <= self.floor:
            return []
        self.floor = self.cursor - self.size + self.size // 128
        dead = [slot for slot, numbers in self.numbers.items() if min(numbers) < self.floor]
        for slot in dead:
            del self.numbers[slot]
        self.retired += len(dead)
        return dead

    def load(self):
        """Go on as after a state was loaded: only frames that are needed stay, in order."""
        used = sorted({number for numbers in self.numbers.values() for number in numbers})
        rank = {number: k for k, number in enumerate(used)}
        kept = {slot: [rank[k] for k in numbers] for slot, numbers in self.numbers.items()}
        self.forget()
        self.numbers, self.cursor = kept, len(used)


class Game:
    """An environment whose stacks begin, go on and end in every way that wrappers have."""

    def __init__(self, depth, shape, dtype, seed):
        self.depth, self.shape, self.dtype = depth, shape, dtype
        self.random = np.random.default_rng(seed)
        self.reset(padded=True)

    def frame(self):
        frame = torch.from_numpy(self.random.integers(0, 3, self.shape))
        if self.dtype.is_floating_point:  # equal numbers are not always equal bits
            frame = torch.tensor([0.0, -0.0, torch.nan])[frame]
        return frame.to(self.dtype)

    def reset(self, *, padded):
        first = self.frame()
        before = first if padded else torch.zeros_like(first)
        self.stack = torch.stack([before] * (self.depth - 1) + [first])

    def step(self, kind):
        """The stacks before and after a step, [k, ...] each."""
        now = self.stack
        new = now[-1] if kind == "still" else self.frame()
        self.stack = torch.cat([now[1:], new.unsqueeze(0)])
        if kind == "skips":
            self.stack = torch.stack([self.frame() for _ in range(self.depth)])
        after = self.stack
        if kind in ("resets", "resets to zeros"):
            self.reset(padded=kind == "resets")
        elif kind == "shows the reset":  # in place of the true final observation
            self.reset(padded=True)
            after = self.stack
        return now, after


KINDS = ("goes on",) * 6 + ("still", "skips", "resets", "resets to zeros", "shows the reset")


def frames_of(now, after):
    """Bytes of all frames of a transition."""
    return [frame.contiguous().numpy().tobytes() for frame in (*now, *after)]


def transitions_of(pairs, number, key=("pixels",)):
    """A TensorDict of transitions of these pairs of stacks, numbered from `number` on."""
    n = len(pairs)
    td = TensorDict({"number": torch.arange(number, number + n)}, [n])
    td[key] = torch.stack([now for now, _ in pairs])
    td["next", *key] = torch.stack([after for _, after in pairs])
    td["next", "reward"] = torch.arange(n).float()
    return td
