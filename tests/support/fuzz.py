"""What the fuzz tests throw at the package, and how they tell that nothing has changed."""

import warnings
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import PerTdError, SumTree

NAN, INF = float("nan"), float("inf")


class Rude:
    """An object that answers every question with an error."""

    def __float__(self):
        raise RuntimeError("no")

    __index__ = __len__ = __array__ = __float__


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])


def hostile() -> dict[str, Any]:
    """Values that are wrong, odd, or at the edge of what is right, by name; made anew."""
    sparse = torch.tensor([1.0, 0.0]).to_sparse()
    values = {
        "none": None,
        "true": True,
        "string": "abc",
        "number in a string": "0.5",
        "bytes": b"1",
        "object": object(),
        "rude object": Rude(),
        "class": int,
        "dict": {"a": 1},
        "set": {1},
        "list": [0, 1],
        "tuple": (1.0, 2.0),
        "nested list": [[0, 1], [1, 0]],
        "ragged list": [[0], [1, 2]],
        "list of None": [None, 1],
        "list of strings": ["0", "1"],
        "empty list": [],
        "int": 1,
        "zero": 0,
        "negative": -1,
        "2**31": 2**31,
        "2**63": 2**63,
        "2**70": 2**70,
        "10**400": 10**400,
        "list of huge": [2**70, 1],
        "float": 0.5,
        "nan": NAN,
        "inf": INF,
        "-inf": -INF,
        "1e38": 1e38,
        "1e39": 1e39,
        "1e308": 1e308,
        "1e-45": 1e-45,
        "complex": 1 + 2j,
        "generator expression": (i for i in range(2)),
        "numpy empty": np.array([]),
        "numpy 0-dim": np.array(1),
        "numpy float": np.array([0.5, 1.0]),
        "numpy big-endian": np.array([0.0, 1.0], ">f4"),
        "numpy reversed": np.arange(2.0, dtype=np.float32)[::-1],
        "numpy objects": np.array([None, 1], object),
        "numpy strings": np.array(["a", "b"]),
        "numpy dates": np.array(["2020-01-01", "2020-01-02"], "M8[D]"),
        "numpy longdouble": np.array([1, 2], np.longdouble),
        "numpy complex": np.array([1j, 2]),
        "numpy scalar": np.float64(0.25),
        "empty": torch.empty(0),
        "empty integers": torch.empty(0, dtype=torch.int64),
        "0-dim": torch.tensor(1.0),
        "0-dim integer": torch.tensor(1),
        "2-dim": torch.ones(2, 2),
        "3-dim": torch.ones(2, 2, 1, dtype=torch.int64),
        "column": torch.ones(2, 1),
        "with nan": torch.tensor([1.0, NAN]),
        "with inf": torch.tensor([INF, 1.0]),
        "with negative": torch.tensor([1.0, -1.0]),
        "with 1e38": torch.tensor([1e38, 3.4e38]),
        "with 1e300": torch.tensor([1.0, 1e300], dtype=torch.float64),
        "with denormals": torch.tensor([1e-45, 1e-40]),
        "requires grad": torch.ones(2, requires_grad=True),
        "0-dim requires grad": torch.tensor(0.5, requires_grad=True),
        "strided": torch.ones(4)[::2],
        "expanded": torch.ones(1).expand(2),
        "lazily negated": torch.tensor([1 + 1j, 2 + 2j]).conj().imag,
        "meta": torch.ones(2, device="meta"),
        "meta integers": torch.ones(2, dtype=torch.int64, device="meta"),
        "meta 0-dim": torch.ones((), device="meta"),
        "sparse": sparse,
        "sparse integers": sparse.long(),
        "nested tensor": _nested(),
        "TensorDict": TensorDict({"x": torch.ones(2)}, [2]),
        "generator": torch.Generator(),
    }
    dtypes = "bool int8 uint8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float64"
    for name in (*dtypes.split(), "complex64", "complex128"):
        values[name] = torch.tensor([0, 1]).to(getattr(torch, name))
    return values


def frozen(value: Any) -> Any:
    """`value` as something that can be compared, tensors byte by byte."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(part) for key, part in value.items()}
    return value


def fingerprint(buffer: Any) -> Any:
    """All that can be read from a buffer or a tree, and the state of torch's own generator."""
    if isinstance(buffer, SumTree):
        return frozen({"mass": buffer[:], "total": buffer.total, "random": torch.get_rng_state()})
    one = buffer.num_buffers is None
    return frozen(
        {
            "state": buffer.state_dict(),
            "priority": buffer.priority,
            "mass": buffer.mass,
            "total": buffer.total_mass,
            "smallest": buffer.smallest_mass,
            "replayed": buffer.replayed if one else None,
            "lengths": buffer.lengths,
            "settings": repr(buffer),
            "keys": {str(key): leaf for key, leaf in buffer.filled_leaves().items()},
            "random": torch.get_rng_state(),
        }
    )


def attempt(target: Any, call: Any, allowed: tuple[type[Exception], ...] = ()) -> str:
    """Run `call`: it works, or raises the package's own error and changes nothing.

    Args:
        target: the buffer or tree that is looked at.
        call: what to do with it.
        allowed: further errors that the documentation names.

    Returns:
        "works", or the name of the error.
    """
    before = fingerprint(target)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    except (PerTdError, *allowed) as refusal:
        error = refusal
    else:
        return "works"
    assert str(error), "an error without words"
    assert fingerprint(target) == before, f"{error!r}, and yet something has changed"
    target.check_valid()
    return type(error).__name__


def check_sound(buffer: Any) -> None:
    """Priorities, masses and sums are finite, and follow from one another; batches are sound."""
    buffer.check_valid()
    if (buffer.mass > 0).any(-1).all():
        weight = buffer.sample(2)["priority_weight"]
        assert (weight.isfinite() & (weight > 0)).all()
