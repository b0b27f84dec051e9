"""Compile the C++ of `cpp/` where it runs, once, and keep the library on disk.

Nothing but the standard library: the C++ includes no header of PyTorch or Python, so a
build takes seconds, and its doors are plain functions for ctypes.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-funroll-loops",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-pthread",
    "-w",
]
_LONGEST = 300
"""Seconds that a compiler may take."""

_log = logging.getLogger("skode")


class BuildError(RuntimeError):
    """The library could not be compiled or loaded; the message says why."""


def library(real: str, activation: str, source: str = "solve") -> ctypes.CDLL:
    """Return the compiled engine for one type, one activation and one kind of field.

    Parameters
    ----------
    real : {"float", "double"}
    activation : {"tanh", "softplus", "silu", "relu"}
    source : {"solve", "flow"}
        What is compiled: for a perceptron, or for a flow.

    Raises
    ------
    BuildError
        If there is no compiler, or if it fails; asked again, it fails again at once.
    """
    outcome = _outcome(real, activation, source)
    if isinstance(outcome, str):
        # A new error each time: one that is raised again keeps all that it met.
        raise BuildError(outcome)
    return outcome


@cache
def _outcome(real: str, activation: str, source: str) -> ctypes.CDLL | str:
    try:
        return _built(real, activation, source)
    except BuildError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the compiled engine cannot be made or loaded: {error}"


def compiler() -> list[str]:
    """Return the C++ compiler's command: CXX of the environment, or one on the path.

    Raises
    ------
    BuildError
        If there is none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise BuildError(
        "there is no C++ compiler: install g++ or clang++ (or name one in the "
        "environment variable CXX), or solve with compile=False"
    )


def cache_directory() -> Path | None:
    """Return where libraries are kept: SKODE_CACHE, or the user's cache directory.

    None if there is none that nobody else may write to: what lies there is run.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(os.environ.get("SKODE_CACHE") or Path(root) / "skode").resolve()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except (OSError, RuntimeError):  # no home, or not a directory
        return None
    if hasattr(os, "geteuid"):
        mine = found.st_uid in (0, os.geteuid())
        if not mine or found.st_mode & 0o022:
            return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


def _built(real: str, activation: str, source: str) -> ctypes.CDLL:
    """Return the library, compiled if it is not on disk or not as it was written."""
    tool = compiler()
    options = [f"-DSKODE_REAL={real}", f"-DSKODE_ACTIVATION={activation.upper()}"]
    name = f"{source}-{real}-{activation}-{_fingerprint(tool, options)}.so"
    options.append(str(_SOURCES / f"{source}.cpp"))
    directory = cache_directory()
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="skode-") as alone:
            _log.warning(
                "There is no cache directory that only you may write to: the engine is "
                "compiled for this process alone. Name one in SKODE_CACHE."
            )
            _compile(tool, options, Path(alone) / name)
            return _load(Path(alone) / name)
    path = directory / name
    if not _whole(path):
        with _alone(path):
            if not _whole(path):  # another process may have been at it
                _compile(tool, options, path)
    return _load(path)


def _whole(path: Path) -> bool:
    """Return whether a library is there, and whole, as it was written."""
    try:
        return _digest_of(path).read_text() == _digest(path)
    except OSError:
        return False


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(tool: list[str], options: list[str], path: Path) -> None:
    begin = time.perf_counter()
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        _run(tool, options, aside)
        _digest_of(path).unlink(missing_ok=True)
        os.replace(aside, path)
        _digest_of(path).write_text(_digest(path))
    finally:
        aside.unlink(missing_ok=True)
    seconds = time.perf_counter() - begin
    _log.info("compiled the engine in %.1f s and kept it in %s", seconds, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from compiling the same, where the system has locks."""
    if fcntl is None:
        yield
        return
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
    lock = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, or with the process
        yield
    finally:
        os.close(lock)


def _run(tool: list[str], options: list[str], out: Path) -> None:
    said = ""
    # Clang for ARM spells "this machine" the second way.
    for native in ("-march=native", "-mcpu=native"):
        try:
            done = subprocess.run(
                [*tool, *_FLAGS, native, *options, "-o", str(out)],
                capture_output=True,
                text=True,
                timeout=_LONGEST,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(
                f"{tool[0]} did not compile the engine: {error}"
            ) from error
        if done.returncode == 0:
            return
        said = said or done.stderr.strip()
    raise BuildError(
        f"{tool[0]} did not compile the engine; solve with compile=False, or name "
        f"another compiler in the environment variable CXX. It said:\n{said[-2000:]}"
    )


def _fingerprint(tool: list[str], options: list[str]) -> str:
    """Return a digest of all that the library depends on."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run(
        [*tool, "--version"], capture_output=True, timeout=_LONGEST, check=False
    ).stdout
    digest.update(version)
    digest.update(repr((_FLAGS, options, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Tell processors apart that share a home directory: code is made for one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    flags = (line for line in text.splitlines() if line.startswith(("flags", "Feat")))
    return next(flags, "")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, (arguments, result) in _DOORS.items():
        if hasattr(loaded, name):
            door = getattr(loaded, name)
            door.argtypes, door.restype = arguments, result
    return loaded


_DOORS: dict[str, tuple[list[type], type | None]] = {
    "skode_tile": ([], ctypes.c_int),
    "skode_begin": ([ctypes.c_char_p], ctypes.c_void_p),
    "skode_forward": ([ctypes.c_void_p, ctypes.c_double], ctypes.c_int),
    "skode_begin_backward": ([ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int),
    "skode_backward": ([ctypes.c_void_p, ctypes.c_double], ctypes.c_int),
    "skode_end": ([ctypes.c_void_p], None),
    "skode_march": ([ctypes.c_char_p], ctypes.c_int),
    "skode_march_back": ([ctypes.c_char_p, ctypes.c_char_p], ctypes.c_int),
}
