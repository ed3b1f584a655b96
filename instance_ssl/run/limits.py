"""System limits of a process: files, memory, threads. Running into one looks like damage, or like a missing peer."""

import errno
import resource

import psutil

from instance_ssl.errors import RankError

# Two dozen are open before the work starts; other ranks, loaders and their batches need the rest.
_OPEN_FILES = 256
_ADDRESS_SPACE_BYTES = 1 << 30
# Messages of operating systems, Python, torch and gloo, which raise errors of different classes.
_SIGNS = {
    "open files": ("Too many open files",),
    "threads or processes": ("can't start new thread", "Resource temporarily unavailable"),
    "memory": ("Cannot allocate memory", "can't allocate memory", "bad_alloc", "failed to map segment"),
}
_ERRNOS = {errno.EMFILE: "open files", errno.ENFILE: "open files", errno.ENOMEM: "memory"}
_LIMITS = {"-n": resource.RLIMIT_NOFILE, "-u": resource.RLIMIT_NPROC, "-v": resource.RLIMIT_AS}
_TO_BLAME = {"open files": ("-n",), "threads or processes": ("-u", "-v"), "memory": ("-v",)}


def check_limits() -> None:
    """Refuses (`RankError`) limits under which a run would fail somewhere and misreport the failure."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _OPEN_FILES:
        raise RankError(f"only {files} files may be open at a time, a run needs {_OPEN_FILES}: raise `ulimit -n`")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    if 0 <= space < used + _ADDRESS_SPACE_BYTES:
        raise RankError(
            f"the address space is limited to {space / 2**30:.1f} GiB, of which the process takes "
            f"{used / 2**30:.1f} GiB, and a run needs more: raise or lift the limit (`ulimit -v`)"
        )


def describe_shortage(error: BaseException | None) -> str | None:
    """Returns one line about what a process ran out of, if an error or one of its causes says so."""
    first = error
    while error is not None:
        lacks = _lacks(error)
        if lacks == "threads or processes" and error is not first:
            lacks = None  # a held lock raises the same message, and is handled
        if lacks is not None:
            limits = ", ".join(map(_ulimit, _TO_BLAME[lacks]))
            return f"out of {lacks} ({limits}): {str(error).splitlines()[0] if str(error) else 'no more'}"
        error = error.__cause__ or error.__context__
    return None


def _lacks(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return _ERRNOS[error.errno]
    if not isinstance(error, (OSError, RuntimeError, ImportError)):
        return None
    return next((what for what, signs in _SIGNS.items() if any(sign in str(error) for sign in signs)), None)


def _ulimit(flag: str) -> str:
    """Formats a limit as the shell's `ulimit` names it."""
    limit, _ = resource.getrlimit(_LIMITS[flag])
    shown = f"{limit / 2**30:.1f} GiB" if flag == "-v" else f"{limit}"
    return f"ulimit {flag}: {'unlimited' if limit == resource.RLIM_INFINITY else shown}"
