"""Compilation of kernels, cached on disk by numba until a kernel is edited.

numba compiles a kernel anew when the file that holds it changes, but not when a file imported by
that one does. The names of its files begin with the qualified name of the function. So that name
gets a hash of the sources of all kernels: after an edit, numba finds nothing under the new name.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import llvmlite
from numba import njit
from numba.extending import intrinsic

from per_td.kernels.choice import checked

CHECKED = checked()
"""Compile with bounds checks, for tests; several times slower."""

part = partial(njit, boundscheck=CHECKED)
"""Compile a function that kernels call."""


@cache
def _sources() -> str:
    """Hash the sources of all kernels and the version of LLVM; numba checks its own."""
    found = sha256(llvmlite.__version__.encode())
    files = [*resources.files(__package__).iterdir()]
    files.append(resources.files("per_td.kernels") / "flags.py")
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith(".py"):
            found.update(file.name.encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile the function below for this signature, to run without the interpreter's lock.

    Raises:
        RuntimeError: numba finds no folder for the result.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        name = function.__qualname__ + ("_checked" if CHECKED else "")
        function.__qualname__ = f"{name}_{_sources()}"
        made = part(signature, cache=True, nogil=True, error_model="numpy")(function)
        if made.stats.cache_misses:
            file = function.__module__.rpartition(".")[2]
            _remove_outdated(Path(made.stats.cache_path), f"{file}.{name}")
        return made

    return compiled


def unary(signature: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """Make a function of one argument from `emit`, which takes LLVM's builder and the argument."""

    @intrinsic
    def operation(typing_context: Any, argument: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emit(builder, arguments[0])

        return signature, generate

    return operation


def _remove_outdated(folder: Path, name: str) -> None:
    """Remove files of this kernel that were compiled from other sources."""
    for file in folder.glob(f"{name}_{'[0-9a-f]' * 16}-*.nb[ic]"):
        if _sources() not in file.name:
            with suppress(OSError):  # another process was faster, or is reading it
                file.unlink()
