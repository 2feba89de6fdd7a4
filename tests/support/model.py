"""One ring of transitions with priorities, in numpy and lists: what the state machines compare to.

Priorities are float32, as in the package, so that they can be compared exactly; masses, sums and
weights are float64.
"""

import math

import numpy as np

TINY, HUGE = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class Ring:
    """Prioritized replay, one transition at a time.

    Args:
        capacity: number of slots.
        alpha, eps: as in the paper.
        new_priority: "buffer_max" or "ever_max".
        rank: whether masses are rank^-alpha, by the order at the last sort.
        sort_interval: changes from one sort to the next; None: as many as there are transitions,
            and at least 256.
    """

    def __init__(
        self,
        capacity,
        *,
        alpha=0.6,
        eps=1e-6,
        new_priority="buffer_max",
        rank=False,
        sort_interval=None,
        clip=None,
    ):
        self.capacity, self.alpha, self.eps = capacity, alpha, eps
        self.new_priority, self.rank, self.sort_interval = new_priority, rank, sort_interval
        self.low, self.high = clip or (None, None)
        self.item, self.draws = [None] * capacity, [0] * capacity
        self.priority = np.zeros(capacity, np.float32)
        self.mass = np.zeros(capacity)
        self.generation = [-1] * capacity
        self.replayed = [False] * capacity
        self.written = self.stale = self.changes = 0
        self.ever_max = np.float32(0)
        self.snapshot = np.zeros(0, np.float32)

    def __len__(self):
        return min(self.written, self.capacity)

    def for_new(self):
        known = self.priority.max() if self.new_priority == "buffer_max" else self.ever_max
        return known if known > 0 else np.float32(1)

    def extend(self, items, priority=None) -> list[int]:
        """Write items; the slots of all, also of those that others overwrite at once."""
        new, slots = self.for_new(), self.write(items)
        if priority is not None:
            self.ever_max = max(self.ever_max, *map(np.float32, priority), np.float32(0))
        for j in range(max(0, len(slots) - self.capacity), len(slots)):
            self.set(slots[j], new if priority is None else np.float32(priority[j]))
        self.changed(min(len(slots), self.capacity))
        return slots

    def write(self, items) -> list[int]:
        """`extend`, but for the priorities."""
        slots = []
        for item in items:
            slots.append(slot := self.take())
            self.item[slot], self.replayed[slot], self.draws[slot] = item, False, 0
        return slots

    def take(self) -> int:
        """The slot that is written next."""
        slot = self.written % self.capacity
        self.generation[slot] = self.written // self.capacity
        self.written += 1
        return slot

    def of_error(self, td_error) -> np.float32:
        priority = abs(np.float32(td_error)) + np.float32(self.eps)
        priority = priority if self.low is None else max(priority, np.float32(self.low))
        return priority if self.high is None else min(priority, np.float32(self.high))

    def update(self, index, td_error, generation=None, mode="set", rate=1.0) -> None:
        old = self.priority.copy()
        new = [self.of_error(error) for error in td_error]
        if mode == "max":
            new = [max(p, np.float32(rate) * old[i]) for p, i in zip(new, index, strict=True)]
        elif mode == "mean":  # where the half of it is passed, torch reckons from the other end
            new = [
                old[i] + np.float32(rate) * (p - old[i])
                if rate < 0.5
                else p - (p - old[i]) * (1 - np.float32(rate))
                for p, i in zip(new, index, strict=True)
            ]
        self.assign(index, new, generation)

    def assign(self, index, priority, generation=None) -> None:
        """Set priorities as they are."""
        live = []
        for j, slot in enumerate(index):
            if generation is not None and generation[j] != self.generation[slot]:
                self.stale += 1
            else:
                live.append(slot)
                self.priority[slot] = np.float32(priority[j])
        for slot in live:
            self.set(slot, self.priority[slot])
        self.changed(len(index))

    def set(self, slot, priority) -> None:
        self.priority[slot] = priority
        if self.rank:  # the place that it would have had at the last sort
            base, power = 1 + int((self.snapshot > priority).sum()), -self.alpha
        else:
            base, power = float(priority), self.alpha
        self.mass[slot] = self.mass_of(base, power) if priority > 0 else 0.0
        self.ever_max = max(self.ever_max, priority)

    @staticmethod
    def mass_of(base, power) -> float:
        log = power * math.log(base)
        return min(max(math.exp(min(log, 200)), TINY), HUGE)

    def changed(self, n) -> None:
        self.changes += n
        if self.rank and self.changes >= (self.sort_interval or max(len(self), 256)):
            self.refill()

    def refill(self) -> None:
        self.changes = 0
        if self.rank:
            self.snapshot = self.priority[: len(self)].copy()
            order = sorted(range(len(self)), key=lambda i: (-self.priority[i], i))
            for rank, slot in enumerate(order, 1):
                positive = self.priority[slot] > 0
                self.mass[slot] = self.mass_of(rank, -self.alpha) if positive else 0.0
        else:
            for slot in range(len(self)):
                self.set(slot, self.priority[slot])

    def set_alpha(self, alpha) -> None:
        if alpha != self.alpha:
            self.alpha = alpha
            self.refill()

    def drawable(self) -> int:
        return int((self.mass > 0).sum())

    def probabilities(self) -> np.ndarray:
        """P(i) of every slot, float64 [capacity]."""
        return self.mass / math.fsum(self.mass)

    def probabilities_by(self, by, newest, mix) -> np.ndarray:
        """P(i) of draws by another rule, [capacity]; see `PrioritizedReplayBuffer.sample`."""
        recent = range(max(0, self.written - min(newest or len(self), len(self))), self.written)
        inside = np.zeros(self.capacity, bool)
        inside[[k % self.capacity for k in recent]] = True
        inside &= self.mass > 0
        one, mass = inside.astype(float), np.where(inside, self.mass, 1.0)
        own = {"priority": mass, "uniform": one, "inverse": np.maximum(1 / mass, TINY)}[by]
        own = np.where(inside, own, 0.0)
        with np.errstate(invalid="ignore"):  # nothing can be drawn
            p = own / own.sum()
            return (1 - mix) * p + mix * one / one.sum() if by == "priority" and mix else p

    def oldest_first(self) -> list[tuple]:
        """Items with their priorities."""
        slots = [k % self.capacity for k in range(self.written - len(self), self.written)]
        return [(self.item[slot], float(self.priority[slot])) for slot in slots]

    def moved(self, capacity) -> "Ring":
        """The newest that fit in another ring, in their order."""
        other = Ring(capacity, alpha=self.alpha, eps=self.eps, new_priority=self.new_priority)
        items = self.oldest_first()
        other.extend([item for item, _ in items], [priority for _, priority in items])
        return other

    def weights(self, index, beta, normalization):
        """w = (N P)^-beta over the largest (section 3.4), by logarithms: nothing overflows."""
        total = math.fsum(self.mass)
        log = {i: -beta * math.log(len(self) * self.mass[i] / total) for i in set(index)}
        least = min(m for m in self.mass if m > 0)
        largest = {
            "batch": max(log.values()),
            "buffer": -beta * math.log(len(self) * least / total),
            "none": 0.0,
        }[normalization]
        return [math.exp(log[i] - largest) for i in index]


class EmptiableRing(Ring):
    """TorchRL's: a slot counts how often it was written, or emptied after that."""

    cursor = size = 0

    def __len__(self):
        return self.size

    def take(self) -> int:
        slot, self.cursor = self.cursor, (self.cursor + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)
        self.generation[slot] += 1
        self.written += 1
        return slot

    def empty(self, *, count=True) -> None:
        """Forget everything, and how much was written if `count`."""
        self.cursor = self.size = 0
        self.priority[:], self.mass[:], self.ever_max = 0, 0, np.float32(0)
        self.generation = [g + 1 if g >= 0 else g for g in self.generation]
        if count:
            self.written = 0
