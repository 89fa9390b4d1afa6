"""The compiled kernels as functions of pointers and sizes. Imports torch, for its OpenMP."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from services.shard.kernels.compiling import CannotCompile, prepare


class Library:
    """One loaded library. Its functions take addresses, so it is the caller who keeps the tensors
    alive, contiguous and of the right type."""

    def __init__(self, path: Path) -> None:
        """Raises CannotCompile where the file can't be loaded."""
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as exc:
            raise CannotCompile(f"{path} can't be loaded: {exc}") from exc
        self.path = path

    def function(self, name: str, *types: type) -> Callable[..., None]:
        """The kernel of that name, which takes arguments of these ctypes and returns nothing."""
        found = getattr(self._library, f"infermesh_{name}")
        found.argtypes = types
        found.restype = None
        return found  # type: ignore[no-any-return]

    def num_helped(self) -> int:
        """Parts of work that a thread wrote for another one, which was late, in this process."""
        count = ctypes.c_int64()
        self.function("num_helped", ctypes.POINTER(ctypes.c_int64))(count)
        return count.value

    def address(self, name: str) -> int:
        """Where the kernel of that name begins, for kernels that call it."""
        found = ctypes.cast(getattr(self._library, f"infermesh_{name}"), ctypes.c_void_p).value
        assert found is not None
        return found


def load(folder: Path, on_compile: Callable[[], None]) -> Library:
    """The library for this processor, compiled if need be; see `compiling.prepare`.

    Raises:
        CannotCompile: there are no kernels here; the sentence says why.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    path = prepare(capability, folder, on_compile)
    try:
        return Library(path)
    except CannotCompile:  # cut off by a full disk, say: once more from the sources
        path.unlink(missing_ok=True)
        return Library(prepare(capability, folder, on_compile))
