"""Compilation of kernels, cached on disk by numba until a kernel is edited.

numba compiles a kernel anew when the file that holds it changes, but not when a file imported by
that one does. The names of its files begin with the qualified name of the function. So that name
gets a hash of the sources of all kernels: after an edit, numba finds nothing under the new name.
"""

import logging
import os
import threading
import time
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

CHECKED = os.environ.get("PER_TD_KERNELS") == "checked"
"""Compile with bounds checks, for tests; several times slower."""

_PATIENCE = 2.0
"""Seconds of compilation after which a line is logged."""

part = partial(njit, boundscheck=CHECKED, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compile a function that kernels call, and nothing else."""


@cache
def _sources() -> str:
    """Hash the sources of all kernels and the version of LLVM; numba checks its own."""
    found = sha256(llvmlite.__version__.encode())
    files = [*resources.files(__package__).iterdir()]
    files.append(resources.files("per_td.kernels") / "parts.py")
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith(".py"):
            found.update(file.name.encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def kernel(signature: str) -> Callable[[Callable[..., Any]], "Kernel"]:
    """Make the function below a kernel; RuntimeError if numba finds no folder for the result."""
    return partial(Kernel, signature=signature)


class Kernel:
    """A function that its first call compiles, to run without the interpreter's lock.

    The compiled function then takes its place in its module, so that later calls go there.
    """

    _making_ready, _compiling = threading.RLock(), threading.Lock()
    _seconds = 0.0

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self._name = function.__qualname__ + ("_checked" if CHECKED else "")
        function.__qualname__ = f"{self._name}_{_sources()}"
        self._function, self._signature = function, signature
        self._compiled = False
        self._failed: BaseException | None = None
        options = {"boundscheck": CHECKED, "nogil": True, "error_model": "numpy"}
        self._made = njit(cache=True, **options)(function)

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function."""
        return self.ready()(*arguments)

    def ready(self) -> Any:
        """Compile the function, unless that is done, and return it."""
        with Kernel._making_ready:
            names = self._function.__globals__
            if not self._compiled:
                for name in self._function.__code__.co_names:
                    if isinstance(names.get(name), Kernel):
                        names[name] = names[name].ready()
                # in a thread, where no signal interrupts numba and leaves it half changed
                finished = threading.Event()  # an interrupted join takes the thread for ended
                threading.Thread(target=self._compile, args=(finished,), daemon=True).start()
                finished.wait()
                if self._failed is not None:
                    raise self._failed
            names[self._function.__name__] = self._made
            return self._made

    def _compile(self, finished: threading.Event) -> None:
        """Compile the function, unless an earlier thread has, whose caller was interrupted."""
        folder = Path(self._made.stats.cache_path)
        name = f"{self._function.__module__.rpartition('.')[2]}.{self._name}"
        with Kernel._compiling:
            started = time.monotonic()
            late = threading.Timer(max(0.0, _PATIENCE - Kernel._seconds), _tell)
            late.daemon = True
            if not any(folder.glob(f"{name}_{_sources()}-*.nbi")):  # else it is only loaded
                late.start()
            try:
                if not self._compiled:
                    self._made.compile(self._signature)
                    self._made.disable_compile()
                    self._compiled = True
            except BaseException as error:
                self._failed = error
            finally:
                late.cancel()
                finished.set()
            if self._made.stats.cache_misses:
                Kernel._seconds += time.monotonic() - started
                _remove_outdated(folder, name)


@cache
def _tell() -> None:
    """Log, once, why a first call takes so long."""
    logging.getLogger("per_td").warning("compiling kernels, once per machine")


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
