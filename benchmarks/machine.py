"""Machine, versions and commit that the numbers belong to.

`python -m benchmarks.machine FILE` writes them down as JSON.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "per-td", "torch", "tensordict", "torchrl", "numba", "triton", "numpy", "cpprb", "flashbax",
    "jax", "tianshou", "gymnasium", "stable-baselines3", "minatar",
)  # fmt: skip


def _from_proc(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def machine() -> dict:
    """Return CPU, cores, memory, GPU."""
    memory = _from_proc("/proc/meminfo", "MemTotal")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _from_proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cpu_cache": _from_proc("/proc/cpuinfo", "cache size"),
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def gpu() -> dict:
    """Return what is known of the GPU and of the torch that drives it."""
    found = {"cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if found["available"]:
        properties = torch.cuda.get_device_properties(0)
        found["name"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["driver"] = _driver()
        float(torch.ones(1, device="cuda"))  # it does what it is told
    return found


def _driver() -> str | None:
    ask = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None


def versions() -> dict[str, str]:
    """Return those of Python and of the packages that are installed; torch's names its build."""
    import per_td

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__, "per-td": per_td.__version__}


def commit() -> dict:
    """Return the hash of the commit, and if the working tree differs from it beside results."""

    def git(*args: str) -> str | None:
        done = subprocess.run(
            ("git", *args), cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        status = git("status", "--porcelain", "--untracked-files=no", ":/", ":!results")
        return {"hash": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
    except OSError:
        return {"hash": None, "dirty": None}


def about() -> dict[str, dict]:
    """Return all of it but the GPU, as it stands in the results."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(about() | {"device": gpu()}))
