"""Faults on demand, for the tests of what survives them: `INSTANCE_SSL_FAULT=point:rank:step:action`.

Nothing happens unless the variable is set. Points are named where they are reached; rank and step are numbers or `*`.
Actions: `kill` (SIGKILL), `freeze` (SIGSTOP), `term` (SIGTERM), `sleep=SECONDS`, `disk-full`, and words that the point
itself acts on: `nan` and `spike`.
"""

import errno
import os
import signal
import time

_VARIABLE = "INSTANCE_SSL_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}


def reach(point: str, rank: int, step: int = 0) -> str | None:
    """Carries out the fault that is ordered for this point, rank and step, and returns its action; None without one.

    Raises:
        OSError: for `disk-full`.
    """
    order = os.environ.get(_VARIABLE)
    if order is None:
        return None
    at_point, at_rank, at_step, action = order.split(":", 3)
    if at_point != point or at_rank not in ("*", str(rank)) or at_step not in ("*", str(step)):
        return None
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    elif action == "disk-full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return action
