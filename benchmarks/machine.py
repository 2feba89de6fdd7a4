"""Which machine, versions and commit the numbers belong to."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["commit", "machine", "versions"]

PACKAGES = (
    "per-td", "torch", "tensordict", "torchrl", "numba", "triton", "numpy", "cpprb", "flashbax",
    "jax", "tianshou", "gymnasium",
)  # fmt: skip


def _from_proc(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def machine() -> dict:
    """CPU, cores, memory, GPU."""
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


def versions() -> dict[str, str]:
    """Those of Python and of the packages that are installed."""
    import per_td

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"per-td": per_td.__version__}


def commit() -> dict:
    """Hash of the commit, and whether the working tree differs from it beside results."""

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
