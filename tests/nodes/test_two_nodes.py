"""Runs over a hostfile, on two nodes with a wire between them: equal to one machine's, and surviving what nodes do.

Tests of what the launcher does over pdsh and ssh need root; those of `--no_ssh` and of what is refused do not.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from injection import environment as ordering
from PIL import Image
from processes import run_forked
from ranks import run_ranks
from two_nodes import (
    CPU_ENVIRONMENT,
    Nodes,
    deepspeed_command,
    free_port,
    two_nodes,
    wait_for,
    why_not,
    write_hostfile,
)

from instance_ssl.config.data import DataConfig
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.run.agreement import share_images
from instance_ssl.run.images import open_images
from instance_ssl.run.log import RunLog
from instance_ssl.run.watchdog import ProcessId

# 512 images in 4 steps an epoch, 12 steps in all, with a checkpoint after every fourth.
TINY = ["--set", "optimization.epochs=3", "optimization.warmup_epochs=1", "checkpoint.every_epochs=1"]
TINY += ["data.limit_train=512", "evaluation.sources=[trained]", "safety.hang_seconds=30", "safety.join_seconds=30"]
TINY += ["evaluation.linear.l2_penalties=[0.001]"]
# Six seconds of training: time for what is done to a run in its midst.
SLOW_STEPS = "step:1:*:sleep=0.5"
# A checkpoint is written when the run is told to stop, and no other; when it has begun is seen in its metrics.
NO_OTHER = ["--set", "checkpoint.every_epochs=99", "log.every_steps=1"]
# As the README has Slurm and Kubernetes start a node, and anybody who wants a run kept going.
SUPERVISED = [sys.executable, str(Path(__file__).parents[2] / "runners/supervise.py"), "--restarts", "0"]
HALT = 40  # seconds in which everything has to have ended


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_nodes() as both:
        yield both


TRAIN = """
from instance_ssl.stages import initialize_classifier, pretrain
from instance_ssl.run.shutdown import leave
from instance_ssl.run.main import StageSpec, run_stages
stages = [StageSpec("initialize_classifier", initialize_classifier.run), StageSpec("pretrain", pretrain.run)]
leave(run_stages(stages))
"""


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are to equal: two ranks of one machine, without a launcher, which takes its time."""
    run = tmp_path_factory.mktemp("one_machine") / "run"
    script = run.with_name("train.py")
    script.write_text(TRAIN)
    finished = run_forked(str(script.with_suffix("")), 2, "--run-dir", str(run), *TINY)
    assert finished.returncode == 0, finished.stderr
    return run


def cpu_environment() -> dict[str, str]:
    return {**os.environ, **CPU_ENVIRONMENT}


def initialised(finished: Path, run: Path) -> Path:
    """A copy of a run as it was before its pre-training."""
    run.mkdir()
    for name in ("data.json", "instances.txt"):
        shutil.copy(finished / name, run)
    shutil.copytree(finished / "initialize_classifier", run / "initialize_classifier")
    return run


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "pretrain/checkpoints").glob("step_*"))


def state(run: Path) -> dict[str, str]:
    """SHA-256 of all that was learned, by file of the newest checkpoint; training.json holds times."""
    files = json.loads((run / "pretrain/checkpoints" / checkpoints(run)[-1] / "MANIFEST.json").read_text())["files"]
    hashes = {name: record["sha256"] for name, record in files.items() if name.endswith(".pt")}
    assert {"encoder.pt", "rank_00000.pt", "rank_00001.pt"} < set(hashes)
    assert sum(name.startswith("rows_") for name in hashes) == 2
    return hashes


def status(run: Path) -> dict[str, str]:
    return json.loads((run / "pretrain/status.json").read_text())


def has_begun(run: Path) -> bool:
    return (run / "pretrain/metrics.jsonl").exists()


def assert_stopped(run: Path) -> None:
    """Before its end and on request, with one checkpoint, which holds the parts of both ranks."""
    (only,) = checkpoints(run)
    assert 0 < int(only.removeprefix("step_")) < 12
    assert state(run)
    assert status(run)["state"] == "stopped"
    # Whichever comes first over ssh: DeepSpeed's signal to the node, or the end of its pdsh.
    assert status(run)["reason"] == "SIGTERM" or "ssh connection" in status(run)["reason"]


def resume(nodes: Nodes, run: Path, output: Path, *settings: str) -> None:
    """The same command again, to the end."""
    with nodes.launched(output, "pretrain", "--run-dir", str(run), *TINY, *settings) as runner:
        assert runner.wait(60) == 0, output.read_text()
    assert "resuming from" in output.read_text()


@pytest.mark.full
def test_two_nodes_end_in_the_state_of_one_machine(nodes: Nodes, one_machine: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    before = nodes.bytes_received()
    with nodes.launched(output, "pipeline", "--run-dir", str(run), *TINY) as runner:
        wait_for("one rank on each node", lambda: nodes.ranks() == [{0}, {1}], 30)
        assert runner.wait(60) == 0, output.read_text()
        assert nodes.processes() == []
    assert nodes.bytes_received() - before > 5e6  # gradients and features took the wire
    result = json.loads((run / "pretrain/result.json").read_text())
    assert result["world_size"] == 2
    assert status(run)["state"] == "complete"
    assert status(run)["host"] == "node0"
    assert state(run) == state(one_machine)


@pytest.mark.full
def test_a_cut_wire_ends_both_nodes_and_the_same_command_resumes(
    nodes: Nodes, one_machine: Path, tmp_path: Path
) -> None:
    run, output = initialised(one_machine, tmp_path / "run"), tmp_path / "output"
    patience = ["--set", "safety.hang_seconds=6"]
    with nodes.launched(output, "pretrain", "--run-dir", str(run), *TINY, *patience, fault=SLOW_STEPS) as runner:
        wait_for("a checkpoint", lambda: checkpoints(run), 40)
        nodes.cut()
        try:
            wait_for("both nodes are empty", lambda: nodes.processes() == [], HALT)
            assert runner.wait(5) != 0
        finally:
            nodes.mend()
    assert checkpoints(run) == ["step_000000004"]
    assert status(run)["state"] == "failed"
    assert "nothing has moved for" in status(run)["reason"]
    for rank in (0, 1):  # neither heard of it from the other
        assert "train_step" in (run / f"pretrain/stacks_rank_0000{rank}.txt").read_text()
    assert "exits with return code = 4" in output.read_text()
    resume(nodes, run, tmp_path / "resumed", *patience)
    assert state(run) == state(one_machine)


@pytest.mark.full
def test_sigterm_to_the_runner_saves_on_both_nodes_and_the_same_command_resumes(
    nodes: Nodes, one_machine: Path, tmp_path: Path
) -> None:
    run, output = initialised(one_machine, tmp_path / "run"), tmp_path / "output"
    with nodes.launched(output, "pretrain", "--run-dir", str(run), *TINY, *NO_OTHER, fault=SLOW_STEPS) as runner:
        wait_for("the first step", lambda: has_begun(run), 40)
        (deepspeed,) = psutil.Process(runner.pid).children()
        deepspeed.send_signal(signal.SIGTERM)
        wait_for("both nodes are empty", lambda: nodes.processes() == [], HALT)
        assert runner.wait(5) != 0
    assert_stopped(run)
    resume(nodes, run, tmp_path / "resumed", *NO_OTHER)
    assert state(run) == state(one_machine)


@pytest.mark.fault
def test_a_supervised_stop_over_ssh_says_that_the_same_command_goes_on(
    nodes: Nodes, one_machine: Path, tmp_path: Path
) -> None:
    run, output = initialised(one_machine, tmp_path / "run"), tmp_path / "output"
    arguments = [value for value in (*TINY, *NO_OTHER) if "[" not in value]
    arguments += ["--run-dir", str(run)]
    with nodes.launched(output, "pretrain", *arguments, before=SUPERVISED, fault="step:1:3:sleep=6") as runner:
        wait_for("the first step", lambda: has_begun(run), 40)
        (supervisor,) = psutil.Process(runner.pid).children()
        supervisor.send_signal(signal.SIGTERM)
        assert runner.wait(HALT) == 75, output.read_text()
        assert nodes.processes() == []
    assert_stopped(run)


@pytest.mark.fault
@pytest.mark.parametrize("killed", ["deepspeed", "pdsh", "ssh"])
def test_a_kill_of_what_started_the_nodes_saves_on_both(
    killed: str, nodes: Nodes, one_machine: Path, tmp_path: Path
) -> None:
    run, output = initialised(one_machine, tmp_path / "run"), tmp_path / "output"
    arguments = [value for value in (*TINY, *NO_OTHER) if "[" not in value]  # which the supervisor lets no shell see
    arguments += ["--run-dir", str(run)]
    with nodes.launched(output, "pretrain", *arguments, before=SUPERVISED, fault="step:1:3:sleep=6") as runner:
        wait_for("the first step", lambda: has_begun(run), 40)
        children = psutil.Process(runner.pid).children(recursive=True)
        by_name = {process.name().removesuffix(".bin"): process for process in children}
        by_name[killed].kill()
        wait_for("both nodes are empty", lambda: nodes.processes() == [], HALT)
        assert runner.wait(5) != 0
    assert_stopped(run)
    resume(nodes, run, tmp_path / "resumed", *NO_OTHER)
    assert state(run) == state(one_machine)


@pytest.mark.fault
@pytest.mark.parametrize("wire", ["up", "down"])
def test_a_node_that_does_not_start_is_not_waited_for(wire: str, nodes: Nodes, tmp_path: Path) -> None:
    output, ends = tmp_path / "output", ["--set", "safety.join_seconds=4"]
    write_hostfile(nodes.work / "hostfile", "node0", "node1" if wire == "down" else "node2")
    try:
        if wire == "down":
            nodes.cut()
        with nodes.launched(output, "pretrain", "--run-dir", str(tmp_path / "run"), *TINY, *ends) as runner:
            assert runner.wait(40) != 0
            assert nodes.processes() == []
    finally:
        nodes.mend()
        write_hostfile(nodes.work / "hostfile", *(node.name for node in nodes.nodes))
    assert "rank 0 of 2 could not join the others" in output.read_text()
    assert "exits with return code = 3" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault
def test_a_node_that_lacks_an_image_is_named_before_the_first_step(nodes: Nodes, tmp_path: Path) -> None:
    run, output, images = tmp_path / "run", tmp_path / "output", tmp_path / "images"
    write_images(images, 128)
    shutil.copytree(images, tmp_path / "others")
    (tmp_path / "others/004.png").unlink()
    nodes.nodes[1].run("mount", "--bind", str(tmp_path / "others"), str(images))
    data = ["--set", "data.kind=folder", f"data.root={images}", "data.limit_train=null"]
    with nodes.launched(output, "pretrain", "--run-dir", str(run), *TINY, *data) as runner:
        assert runner.wait(40) != 0
        assert nodes.processes() == []
    assert "error: data.root: rank 1: " in output.read_text()
    assert "004.png" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert not run.exists()


@pytest.fixture
def no_ssh(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are ended, with all that they have started, at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.wait()


def start_no_ssh(
    started: list[subprocess.Popen[bytes]], directory: Path, run: Path, *settings: str, fault: str | None = None
) -> list[subprocess.Popen[bytes]]:
    """A runner for each of two nodes, both of which are this machine."""
    write_hostfile(directory / "hostfile", "first", "second")
    port = str(free_port())
    environment = cpu_environment() | ordering(fault, directory / "fault.txt")
    own, arguments = [], ["--run-dir", str(run), *TINY, *settings]
    for rank in range(2):
        flags = ["--no_ssh", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        command = deepspeed_command(directory / "hostfile", flags, "pretrain", arguments, is_faulty=fault is not None)
        with (directory / f"output{rank}").open("a") as file:
            own.append(subprocess.Popen([*SUPERVISED, *command], env=environment, stdout=file, stderr=file))
    started += own
    return own


@pytest.mark.fault
@pytest.mark.parametrize("to", ["every process", "one supervisor"])  # as Slurm does it, as Kubernetes does it to a pod
def test_sigterm_without_ssh_saves_before_the_supervisors_leave(
    to: str, no_ssh: list[subprocess.Popen[bytes]], one_machine: Path, tmp_path: Path
) -> None:
    run = initialised(one_machine, tmp_path / "run")
    supervisors = start_no_ssh(no_ssh, tmp_path, run, *NO_OTHER, fault=SLOW_STEPS)
    wait_for("the first step", lambda: has_begun(run), 40)
    everything = [psutil.Process(each.pid) for each in supervisors]
    everything += [child for each in supervisors for child in psutil.Process(each.pid).children(recursive=True)]
    assert len(everything) == 2 * len(["supervisor", "deepspeed", "its launcher", "rank"])
    ids = [ProcessId.of(process) for process in everything]
    for process in everything if to == "every process" else everything[1:2]:
        process.send_signal(signal.SIGTERM)
    assert [each.wait(HALT) for each in supervisors] == [75, 75], (tmp_path / "output0").read_text()
    assert not any(each.is_alive() for each in ids)
    assert_stopped(run)
    assert (tmp_path / "fault.txt").exists()
    assert [each.wait(60) for each in start_no_ssh(no_ssh, tmp_path, run, *NO_OTHER)] == [0, 0]
    assert "nnodes=2, num_local_procs=1, node_rank=1" in (tmp_path / "output1").read_text()
    assert state(run) == state(one_machine)


def write_images(directory: Path, count: int) -> None:
    directory.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(directory / f"{number:03d}.png")


def open_own_images(group: Group, directories: list[Path]) -> str:
    """What opening a folder gives where it is another one on each rank."""
    os.chdir(directories[group.rank])
    try:
        data = DataConfig(kind="folder", root=Path("images"))
        return str(len(share_images(open_images(data, "train", group, RunLog(is_main=False)), None, group)))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("difference", ["none", "missing", "longer"])
def test_ranks_with_other_images_than_rank_0_are_refused(difference: str, tmp_path: Path) -> None:
    directories = [tmp_path / "node0", tmp_path / "node1"]
    for directory in directories:
        directory.mkdir()
        write_images(directory / "images", 8)
    odd = directories[1] / "images/003.png"
    if difference == "missing":
        odd.unlink()
    elif difference == "longer":
        odd.write_bytes(odd.read_bytes() + b"x")
    answers = run_ranks(open_own_images, 2, directories)
    if difference == "none":
        assert answers == ["8", "8"]
    else:
        assert answers[0] == answers[1]  # no rank goes on alone
        assert answers[0].startswith("data.root: rank 1: images/003.png")


JOIN = """
from instance_ssl.distributed import comm
try:
    comm.initialize(join_seconds=2)
except comm.AbsentPeersError as error:
    print(error)
"""


def test_a_rank_does_not_wait_for_long_for_ranks_that_never_come() -> None:
    waiting = []
    for rank in (0, 1):  # each of another world
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": str(rank), "WORLD_SIZE": "2"}
        environment = cpu_environment() | place
        waiting.append(
            subprocess.Popen([sys.executable, "-c", JOIN], env=environment, stdout=subprocess.PIPE, text=True)
        )
    for rank, process in enumerate(waiting):
        told, _ = process.communicate(timeout=60)
        assert told.startswith(f"rank {rank} of 2 could not join the others at 127.0.0.1:")
        assert "safety.join_seconds" in told
        assert len(told.splitlines()) == 1
