"""Ends a process that had joined a world."""

import atexit
import os
import sys
import threading
from typing import NoReturn

from instance_ssl.run.console import heard_or_not


def leave(code: int) -> NoReturn:
    """Exits as `SystemExit` does, but without tearing down the interpreter.

    Threads of gloo and NCCL outlive `destroy_process_group` while anything refers to a group, and may free a Python
    tensor during teardown. The interpreter then kills the thread, which C++ does not allow: a finished run aborted in
    about one of a hundred exits on a busy machine (pytorch/pytorch#38228, #179291).
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()  # loader processes are ended here, among other things
    for stream in (sys.stdout, sys.stderr):
        with heard_or_not(stream):
            stream.flush()
    os._exit(code)
