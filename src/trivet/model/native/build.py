"""Compiles kernels.cpp once for this machine and loads it; without a compiler it says so, once.

The library lies in the user's cache (XDG_CACHE_HOME, else ~/.cache) under a name made of all that it
depends on: sources, flags, compiler, torch, Python and the processor, because -march=native may use whatever this
one has. Left out: anything but Linux and g++, where PyTorch computes instead.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

SOURCES = [Path(__file__).parent / name for name in ("kernels.cpp", "products.h")]
NAME = "trivet_kernels"
# Contraction makes fused multiply-adds; neither flag below lets the compiler reorder a sum.
FLAGS = "-O3 -march=native -std=c++20 -fPIC -shared -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"


@functools.cache
def load() -> ModuleType | None:
    """The compiled module, or None with one warning that says why (none where TRIVET_NATIVE=0 asks for it)."""
    if os.environ.get("TRIVET_NATIVE", "1") == "0":
        return None
    try:
        path = _compiled(_cache())
        spec = importlib.util.spec_from_file_location(NAME, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (OSError, ImportError, RuntimeError) as e:
        warnings.warn(
            f"No decode kernels, so a step of decoding on this CPU takes two to four times as long as it could: {e} "
            "Install g++ and Python's headers, or set TRIVET_NATIVE=0 to do without.",
            stacklevel=2,
        )
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivet"


def _compiled(folder: Path) -> Path:
    """The library's path, compiled if it is not there. Raises OSError or RuntimeError where that fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        raise RuntimeError("there is no g++ here." if sys.platform == "linux" else "they are built on Linux only.")
    depends = [source.read_bytes() for source in SOURCES]
    depends += [str(part).encode() for part in (FLAGS, compiler, torch.__version__, sys.version, _processor())]
    path = folder / f"{NAME}-{hashlib.sha256(b'|'.join(depends)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together compile once; the lock dies with its owner
        if not path.exists():
            print("trivet: compiling the decode kernels for this CPU, once: about 20 seconds", file=sys.stderr)
            aside = path.with_suffix(f".{os.getpid()}")
            done = subprocess.run(_command(compiler, aside), capture_output=True, text=True)
            if done.returncode:
                wrong = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
                raise RuntimeError(f"{compiler} failed ({wrong[0].strip()}).")
            os.replace(aside, path)
    return path


def _command(compiler: str, out: Path) -> list[str]:
    root = Path(torch.__file__).parent
    headers = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    libraries = [f"-L{root / 'lib'}", *(f"-l{name}" for name in ("c10", "torch_cpu", "torch", "torch_python"))]
    define = f"-DTORCH_EXTENSION_NAME={NAME}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*compiler.split(), *FLAGS.split(), *define, *(f"-I{h}" for h in headers), str(SOURCES[0]), "-o", str(out), *libraries]  # fmt: skip


def _processor() -> str:
    """Model and instruction sets, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    kept = [next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags")]
    return "|".join([platform.machine(), *kept])
