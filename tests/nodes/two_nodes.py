"""Two nodes on one machine, made of namespaces: what is tested on them goes over a wire, ssh and two process tables.

A node is one `unshare`d sshd with a network, host name, process table and mounts of its own: /etc/hosts and /etc/ssh
are bound over there, so nothing outside is written, and when that one process ends, whatever runs on the node ends and
the wire is gone. The kernel ends it even where the tests themselves are killed. A process table of its own is no luxury
either: DeepSpeed stops its nodes with a broad `pkill -f`, which would meet other runs of this machine.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from injection import environment as ordering

_ROOT = Path(__file__).parents[2]
_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh", "pkill")
CPU_ENVIRONMENT = {
    "PYTHONPATH": str(_ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}
_UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_SET_UP = """
set -e
hostname {name}
ip link set lo up
mount --bind {files}/hosts /etc/hosts
mount --bind {files}/ssh /etc/ssh
mount -t tmpfs none /run
mkdir /run/sshd
exec /usr/sbin/sshd -D -e
"""
# A wire that is cut must not keep ssh waiting for TCP's quarter of an hour; the README asks operators for the same.
_SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile {directory}/user_key.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
ClientAliveInterval 1
ClientAliveCountMax 4
"""
_SSH_CONFIG = """
IdentityFile {directory}/user_key
UserKnownHostsFile {directory}/known_hosts
BatchMode yes
ConnectTimeout 5
ServerAliveInterval 1
ServerAliveCountMax 4
"""


def why_not() -> str | None:
    """What this machine lacks to hold two nodes; None when nothing."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    made = subprocess.run([*_UNSHARE, "ip", "link", "add", "eth0", "type", "veth"], capture_output=True, text=True)
    return f"no namespaces or veth here: {made.stderr.strip()}" if made.returncode else None


class Node:
    """One node that is up.

    Attributes:
        name: its host name.
        address: on the wire between the two.
        init: the process (seen from outside) with which all others on it end.
    """

    def __init__(self, name: str, address: str, init: psutil.Process) -> None:
        self.name, self.address, self.init = name, address, init
        self._processes = _process_table(init.pid)

    def enter(self, *command: str, directory: Path = Path("/")) -> list[str]:
        """`command`, to be run on the node, in `directory`."""
        node = ["--target", str(self.init.pid), "--net", "--uts", "--mount", "--pid"]
        return ["nsenter", *node, f"--wd={directory}", *command]

    def run(self, *command: str) -> str:
        """Runs a short command on the node and returns what it says."""
        return subprocess.run(self.enter(*command), capture_output=True, text=True, check=True, timeout=20).stdout

    def processes(self) -> list[psutil.Process]:
        """All that runs on the node now, except its sshd."""
        alive = []
        for process in psutil.process_iter():
            try:
                here = _process_table(process.pid) == self._processes and process != self.init
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (psutil.Error, OSError):  # gone in the meantime
                continue
        return alive

    def ranks(self) -> set[int]:
        """Ranks that run on the node now."""
        found = set()
        for process in self.processes():
            try:
                found |= {int(process.environ()["RANK"])}
            except (psutil.Error, KeyError):
                continue
        return found


class Nodes:
    """The two nodes, and runners started on the first with the hostfile of both.

    Attributes:
        work: a directory that both see: the current one of what is started, with hostfile and .deepspeed_env.
    """

    def __init__(self, nodes: list[Node], work: Path) -> None:
        self.nodes, self.work = nodes, work
        write_hostfile(work / "hostfile", *(node.name for node in nodes))

    @contextmanager
    def launched(
        self, output: Path, runner: str, *arguments: str, before: Sequence[str] = (), fault: str | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """`deepspeed --hostfile … runners/<runner>.py …` over pdsh and ssh; whatever it leaves running is ended.

        Args:
            output: the file for what it prints.
            before: what the command follows: a supervisor's.
            fault: an order for `injection` on the nodes, which must be carried out.
        """
        # Nothing else of the environment but PYTHON… reaches a node.
        record = output.with_suffix(".fault")
        exported = {**CPU_ENVIRONMENT, **ordering(fault, record)}
        (self.work / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
        master = self.nodes[0]
        launcher = ["--launcher", "pdsh", "--master_addr", master.address]
        hostfile, is_faulty = self.work / "hostfile", fault is not None
        command = [*before, *deepspeed_command(hostfile, launcher, runner, arguments, is_faulty=is_faulty)]
        # The .deepspeed_env of the home directory would be read too.
        environment = {**os.environ, **CPU_ENVIRONMENT, "HOME": str(self.work)}
        with output.open("w") as file:
            started = subprocess.Popen(
                master.enter(*command, directory=self.work), env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            yield started
            assert fault is None or record.exists()
        finally:
            for node in self.nodes:
                for process in node.processes():
                    process.kill()
            started.wait(10)

    def processes(self) -> list[psutil.Process]:
        """All that runs on both nodes."""
        return [process for node in self.nodes for process in node.processes()]

    def ranks(self) -> list[set[int]]:
        """The ranks that run on each node."""
        return [node.ranks() for node in self.nodes]

    def cut(self) -> None:
        """Takes the wire between the nodes away."""
        self.nodes[0].run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Gives it back."""
        self.nodes[0].run("ip", "link", "set", "eth0", "up")
        self.nodes[0].run("ssh", self.nodes[1].name, "hostname")

    def bytes_received(self) -> int:
        """What has come over the wire to the second node."""
        (line,) = (line for line in self.nodes[1].run("cat", "/proc/net/dev").splitlines() if "eth0:" in line)
        return int(line.partition(":")[2].split()[0])


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Two nodes, node0 and node1, that see each other on 10.99.0.0/24, and share all files."""
    addresses = {"node0": "10.99.0.1", "node1": "10.99.0.2"}
    with TemporaryDirectory() as name, ExitStack() as held:
        directory = Path(name)
        _make_key(directory / "user_key")
        nodes = [held.enter_context(_node(name, addresses, directory)) for name in addresses]
        wire = ["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns"]
        first, second = (str(node.init.pid) for node in nodes)  # numbers of the outer process table: stay in that
        subprocess.run(["nsenter", "--target", first, "--net", "ip", *wire, second], check=True)
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")
        work = directory / "work"
        work.mkdir()
        yield Nodes(nodes, work)


@contextmanager
def _node(name: str, addresses: dict[str, str], directory: Path) -> Iterator[Node]:
    files = directory / name
    (files / "ssh").mkdir(parents=True)
    (files / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in addresses.items()))
    with (directory / "known_hosts").open("a") as known:
        known.write(f"{name} {_make_key(files / 'ssh/host_key')}")
    (files / "ssh/sshd_config").write_text(_SSHD_CONFIG.format(directory=directory))
    (files / "ssh/ssh_config").write_text(_SSH_CONFIG.format(directory=directory))
    command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "bash", "-c", _SET_UP.format(name=name, files=files)]
    said = files / "sshd.log"
    with said.open("w") as log:
        outer = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for("sshd", lambda: "listening" in said.read_text() or outer.poll() is not None, 10)
        assert outer.poll() is None, said.read_text()
        (init,) = psutil.Process(outer.pid).children()
        try:
            yield Node(name, addresses[name], init)
        finally:
            init.kill()
            outer.wait(10)
    finally:
        outer.kill()
        outer.wait(10)


def _make_key(path: Path) -> str:
    """Writes a key pair and returns its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text()


def write_hostfile(path: Path, *names: str) -> None:
    """One slot a node."""
    path.write_text("".join(f"{name} slots=1\n" for name in names))


def deepspeed_command(
    hostfile: Path, flags: Sequence[str], runner: str, arguments: Sequence[str], *, is_faulty: bool = False
) -> list[str]:
    """`deepspeed --hostfile … runners/<runner>.py …`; a faulty runner carries out what the environment orders."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hostfile)]
    folder = _ROOT / ("tests/faults/runners" if is_faulty else "runners")
    return [*launcher, *flags, str(folder / f"{runner}.py"), *arguments]


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Asks again and again until it holds.

    Raises:
        AssertionError: when it does not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def free_port() -> int:
    """A port of this machine that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process_table(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")
