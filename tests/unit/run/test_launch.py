"""What the supervisor refuses before DeepSpeed's launcher is started."""

from pathlib import Path

import pytest

from instance_ssl.distributed.comm import has_code_for
from instance_ssl.errors import UserError
from instance_ssl.run.launch import check_launch, read_hostfile, take_apart

SCRIPT = ["runners/pretrain.py", "--run-dir", "runs/a"]


def launch_on(hostfile: Path, *script: str) -> None:
    check_launch(take_apart(["deepspeed", "--hostfile", str(hostfile), *(script or SCRIPT)]), {})


@pytest.fixture
def two_hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nnode1 slots=8\n\nnode-2.local slots=4  # the small one\n")
    return path


def test_a_hostfile_is_ranks_by_host(two_hosts: Path) -> None:
    assert read_hostfile(two_hosts) == {"node1": 8, "node-2.local": 4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1 slots=8\nnode2\n", "line 2"),
        ("node1 slots=0\n", "line 1"),
        ("node1 slots=many\n", "line 1"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: duplicate host node1"),
        ("node1;reboot slots=8\n", "line 1"),
        ("-oProxyCommand=x slots=8\n", "line 1"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_is_refused_by_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=expected):
        launch_on(tmp_path / "hosts")


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        launch_on(tmp_path / "absent")


@pytest.mark.parametrize(
    "argument", ["a;reboot", "$(reboot)", "`reboot`", "a b", "a|b", "a&b", "a>b", "'a'", 'a"', "a\nb"]
)
def test_an_argument_with_a_meaning_to_a_shell_is_refused_over_ssh(two_hosts: Path, argument: str) -> None:
    with pytest.raises(UserError, match="does not quote"):
        launch_on(two_hosts, *SCRIPT, "--set", argument)


def test_plain_arguments_are_not(two_hosts: Path) -> None:
    launch_on(two_hosts, *SCRIPT, "--set", "optimization.epochs=1000", "data.root=/data/imagenet-1k_v2")


def test_an_exported_variable_is_looked_at_too(two_hosts: Path) -> None:
    launch = take_apart(["deepspeed", "--hostfile", str(two_hosts), *SCRIPT])
    check_launch(launch, {"NCCL_SOCKET_IFNAME": "eth0", "UNRELATED": "a; b"})
    with pytest.raises(UserError, match="NCCL_SOCKET_IFNAME"):
        check_launch(launch, {"NCCL_SOCKET_IFNAME": "eth0; reboot"})


def test_so_is_the_environment_file(two_hosts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nX=$(reboot)\n")
    with pytest.raises(UserError, match="line 2"):
        launch_on(two_hosts)


def test_one_machine_needs_no_shell(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    launch_on(tmp_path / "hosts", *SCRIPT, "--set", "evaluation.knn.neighbours=[10, 5]")
    check_launch(take_apart(["deepspeed", "--num_gpus", "2", *SCRIPT, "--set", "a=[1, 2]"]), {})


@pytest.mark.parametrize("command", [[], ["python", *SCRIPT]])
def test_a_command_of_another_program_is_refused(command: list[str]) -> None:
    with pytest.raises(UserError, match="whole command"):
        take_apart(command)


@pytest.mark.parametrize("command", [["/venv/bin/torchrun"], ["python", "-m", "torch.distributed.run"]])
def test_torchrun_passes_signals_on_itself_and_reads_no_hostfile(command: list[str]) -> None:
    launch = take_apart([*command, "--nproc-per-node", "2", *SCRIPT])
    assert launch.passes_signals_on
    assert launch.hostfile is None
    assert launch.run_directory == Path("runs/a")


def test_the_run_directory_is_found() -> None:
    assert take_apart(["deepspeed", "--num_gpus", "2", *SCRIPT]).run_directory == Path("runs/a")
    assert take_apart(["deepspeed", *SCRIPT[:1], "--run-dir=b"]).run_directory == Path("b")
    assert take_apart(["deepspeed", *SCRIPT[:1]]).run_directory is None


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_80"], False),
    ],
)
def test_a_gpu_without_code_for_it_is_told_apart(
    capability: tuple[int, int], architectures: list[str], served: bool
) -> None:
    assert has_code_for(capability, architectures) == served
