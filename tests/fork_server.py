"""One server for the whole session that has imported what the tests' processes need, and forks them in milliseconds.

Importing torch, torchvision and DeepSpeed takes a process about seven CPU seconds; a fork takes a hundredth of one.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

# Without modules that start threads when they are imported (pyarrow, onnxruntime): a fork keeps none of them.
PRELOADED = (
    "torch",
    "torchvision",
    "torch.ao.quantization",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "networkx",
    "setuptools",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.stage_1_and_2",
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torchmetrics.detection",
    "pycocotools.mask",
    "pytest",
    "instance_ssl.classifier.shard",
    "instance_ssl.report.command",
    "instance_ssl.stages.evaluate_checkpoints",
    "instance_ssl.stages.evaluate_detection",
    "instance_ssl.stages.evaluate_fine_tune",
    "instance_ssl.stages.evaluate_knn",
    "instance_ssl.stages.evaluate_linear",
    "instance_ssl.stages.evaluate_retrieval",
    "instance_ssl.stages.evaluate_semi_supervised",
    "instance_ssl.stages.evaluate_similarity",
    "instance_ssl.stages.export",
    "instance_ssl.stages.initialize_classifier",
    "instance_ssl.stages.plan",
    "instance_ssl.stages.pretrain",
    "instance_ssl.stages.show_views",
    "instance_ssl.training.engine",
)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(PRELOADED))


def start_script(
    script: Path, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path
) -> ForkServerProcess:
    """Starts `python script arguments …` in a forked process: its directory, environment, streams and exit code.

    Args:
        stdout, stderr: files that the process appends to; several ranks may share them.
    """
    target = (str(script), list(arguments), dict(environment), str(cwd), str(stdout), str(stderr))
    process = context.Process(target=_run_script, args=target)
    process.start()
    return process


def _run_script(
    script: str, arguments: list[str], environment: dict[str, str], cwd: str, stdout: str, stderr: str
) -> NoReturn:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, stdout), (2, stderr)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite under nohup would pass it on as ignored
    if "OMP_NUM_THREADS" in environment:  # OpenMP reads it once, when torch is imported
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
