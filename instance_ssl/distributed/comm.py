"""Process groups and their collectives. The only file that imports `torch.distributed`.

Everything that communicates takes a `Group` explicitly. One process is a group of size 1 that runs the same
collectives; nothing here branches on it.
"""

import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from instance_ssl.distributed import launched
from instance_ssl.distributed.clock import AwakeClock
from instance_ssl.errors import AbsentPeersError, RankError, UserError

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast"]

# Effectively none: a collective's own timeout also runs while the process is stopped. The guard ends a hang instead.
_TIMEOUT = timedelta(days=30)
_JOIN_SECONDS = 600.0

# Names from torch 2.14 on, or before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def ring_bytes(collective: Collective, tensor_bytes: int, size: int) -> int:
    """Returns the bytes that one of `size` ranks sends when the collective runs as a ring.

    Args:
        tensor_bytes: of one rank's input (all-gather), output (reduce-scatter) or both (all-reduce, broadcast).
    """
    times = {"all_reduce": 2 * (size - 1) / size, "broadcast": min(1, size - 1)}.get(collective, size - 1)
    return round(tensor_bytes * times)


@dataclass(frozen=True)
class Group:
    """Ranks that communicate. Tensors passed to its methods are on the group's device.

    Attributes:
        handle: the `torch.distributed` process group.
        rank: this process's place in the group, 0 … size - 1.
        size: number of ranks T.
        device: of the tensors of its collectives.
        sent_bytes: by collective, the bytes this rank has sent so far if each runs as a ring (the algorithm of NCCL and
            gloo for large tensors), computed from the tensors passed in. Small objects are not counted.
    """

    handle: Any
    rank: int
    size: int
    device: torch.device
    sent_bytes: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    def row_counts(self, count: int) -> list[int]:
        """Gathers every rank's `count`, in order of rank (one small all-gather)."""
        own = torch.tensor([count], dtype=torch.int64, device=self.device)
        out = torch.empty(self.size, dtype=torch.int64, device=self.device)
        _all_gather_single(out, own, group=self.handle)
        return out.tolist()

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Concatenates every rank's rows, (b, …) → (B, …), in order of rank.

        Args:
            counts: rows of each rank; None if all ranks hold equally many.
        """
        if counts is None or len(set(counts)) == 1:
            out = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
            self._count("all_gather", rows)
            _all_gather_single(out, rows.contiguous(), group=self.handle)
            return out
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = self.all_gather_rows(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def reduce_scatter_rows(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Sums (B, …) over the ranks and returns the local rows (b, …): the transpose of `all_gather_rows`."""
        if counts is None or len(set(counts)) == 1:
            out = rows.new_empty((rows.shape[0] // self.size, *rows.shape[1:]))
            self._count("reduce_scatter", out)
            _reduce_scatter_single(out, rows.contiguous(), group=self.handle)
            return out
        padded = nn.utils.rnn.pad_sequence(rows.split(list(counts)), batch_first=True)
        return self.reduce_scatter_rows(padded.flatten(0, 1))[: counts[self.rank]]

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Takes the element-wise maximum over the ranks, in place."""
        self._all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_reduce_min_(self, tensor: Tensor) -> Tensor:
        """Takes the element-wise minimum over the ranks, in place."""
        self._all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Copies rank `source`'s tensor to all ranks, in place."""
        self._count("broadcast", tensor)
        dist.broadcast(tensor, group=self.handle, group_src=source)
        return tensor

    def start_broadcast_(self, tensor: Tensor, source: int) -> "Transfer":
        """Starts a `broadcast_` and returns. No rank writes to the tensor, and no receiver reads it, before `wait`."""
        return Transfer(tensor, dist.broadcast(tensor, group=self.handle, group_src=source, async_op=True))

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Gathers every rank's (picklable, small) object, in order of rank."""
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.handle)
        return out

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Broadcasts rank `source`'s (picklable) object."""
        box = [value]
        dist.broadcast_object_list(box, group=self.handle, group_src=source)
        return box[0]

    def barrier(self) -> None:
        """Waits until every rank is here. Reading the result makes the host wait too, not only its GPU."""
        self.all_reduce_sum_(torch.zeros(1, device=self.device)).item()

    def _all_reduce(self, tensor: Tensor, operation: Any) -> None:
        self._count("all_reduce", tensor)
        dist.all_reduce(tensor, op=operation, group=self.handle)

    def _count(self, collective: Collective, tensor: Tensor) -> None:
        self.sent_bytes[collective] += ring_bytes(collective, tensor.numel() * tensor.element_size(), self.size)


@dataclass(frozen=True)
class Transfer:
    """A collective in flight: the received tensor, kept alive until it has arrived, and torch's handle."""

    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """Returns the tensor once it has arrived (on a GPU: once work queued from now on may use it)."""
        self.work.wait()
        return self.tensor


def initialize(join_seconds: float = _JOIN_SECONDS) -> Group:
    """Joins the launcher's world, or a world of one when run bare, and returns it as a group.

    Uses NCCL and one GPU a rank where CUDA is available, gloo on the CPU otherwise.

    Args:
        join_seconds: total time to wait for the other ranks.

    Raises:
        UserError: more ranks were launched on this machine than it has GPUs, or torch has no code for its GPU.
        RankError: the ranks cannot meet; an `AbsentPeersError` where some did not join.
    """
    use_cuda = torch.cuda.is_available()
    if not use_cuda and (threads := launched.num_threads()) is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda", launched.local_rank()) if use_cuda else torch.device("cpu")
    if use_cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs: launch no more ranks on it (--num_gpus, "
                "--nproc-per-node, --ntasks-per-node)"
            )
        torch.cuda.set_device(device)
        capability, served = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        if not has_code_for(capability, served):
            raise UserError(
                f"this build of torch ({torch.__version__}: {' '.join(served)}) has no code for a "
                f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}): "
                "install one that has"
            )
        # bfloat16 products are summed in float32 throughout: the hard-class search relies on their error bound.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if launched.world_size() > 1:
        return _join("env://", launched.rank(), launched.world_size(), device, join_seconds)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # what the launcher would say; DeepSpeed asks for it
    return _join(None, 0, 1, device)


def existing_group(handle: Any = None) -> Group:
    """Returns a process group that the caller has started as a `Group`.

    Its collectives run on the current GPU where the group has NCCL, and on the CPU otherwise.

    Args:
        handle: a `torch.distributed` process group; None: the default one. Where none is started, a world of this
            process alone, which the default group may follow.

    Raises:
        RuntimeError: none is started although this process was launched as one of several, or this process is not in
            the given one.
    """
    if handle is None and not dist.is_initialized():
        if launched.world_size() > 1:
            raise RuntimeError(
                f"WORLD_SIZE is {launched.world_size()} and no process group is started: call "
                "torch.distributed.init_process_group() (or what does it for you) first"
            )
        return _world_of_one()
    handle = dist.group.WORLD if handle is None else handle
    if dist.get_rank(handle) < 0:
        raise RuntimeError("this process is not in the given process group")
    has_nccl = torch.cuda.is_available() and "cuda:nccl" in dist.get_backend_config(handle)
    device = torch.device("cuda", torch.cuda.current_device()) if has_nccl else torch.device("cpu")
    return Group(handle, dist.get_rank(handle), dist.get_world_size(handle), device)


def default_world_size() -> int:
    """Returns the size of the default process group; 1 where none is started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _world_of_one() -> Group:
    """A group that is not the default one, and so never in the way of one that is started later."""
    handle = dist.ProcessGroup(dist.HashStore(), 0, 1)
    backend: Any
    if torch.cuda.is_available():
        device, kind = torch.device("cuda", torch.cuda.current_device()), dist.ProcessGroup.BackendType.NCCL
        backend = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, dist.ProcessGroupNCCL.Options())
    else:
        device, kind = torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO
        backend = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, _TIMEOUT)
    handle._set_default_backend(kind)
    handle._register_backend(torch.device(device.type), kind, backend)
    return Group(handle, 0, 1, device)


def has_code_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a GPU can run one of these: code for its own generation (sm_86), or older code that can be recompiled."""
    own = 10 * capability[0] + capability[1]

    def serves(architecture: str) -> bool:
        kind, _, number = architecture.partition("_")
        version = int("".join(filter(str.isdigit, number)) or 0)
        return version <= own and (kind == "compute" or version // 10 == capability[0])

    return any(map(serves, architectures))


def initialize_from_file(path: str, rank: int, size: int) -> Group:
    """Joins a gloo world of `size` CPU ranks that rendezvous in a file, without port or launcher."""
    return _join(f"file://{path}", rank, size, torch.device("cpu"))


def _join(init_method: str | None, rank: int, size: int, device: torch.device, seconds: float = _JOIN_SECONDS) -> Group:
    """Meets the other ranks, if there are any (`init_method`), within `seconds` in total."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def meet() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        store: dist.Store = dist.HashStore()
        if init_method is not None:
            met, _, _ = next(dist.rendezvous(init_method, rank, size, timeout=_TIMEOUT))
            met.set_timeout(_TIMEOUT)
            store = dist.PrefixStore(f"attempt_{launched.attempt()}", met)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)

    try:
        _within(seconds, meet)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise RankError(
                f"{where}, where the ranks meet, is in use: give another --master_port or MASTER_PORT"
            ) from None
        if not lost_peer(error):
            raise
        reason = f"({str(error).splitlines()[0]}): another rank has ended, and says why if it could"
    except TimeoutError:
        reason = (
            f"within {seconds:g} s (safety.join_seconds): does every rank run, on every node of the hostfile, and "
            "reach that address, where nothing else may listen?"
        )
    else:
        return Group(dist.group.WORLD, rank, size, device)
    raise AbsentPeersError(f"rank {rank} of {size} could not join the others at {where} {reason}")


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Does blocking work on a thread, and abandons it with a `TimeoutError` when it takes too long.

    The work has several timeouts that add up, or none: a store's first answer is awaited forever.
    """
    problems: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    thread, clock = threading.Thread(target=run, name="join", daemon=True), AwakeClock()
    thread.start()
    while thread.is_alive():
        if clock.read() > seconds:
            raise TimeoutError
        thread.join(0.1)
    if problems:
        raise problems[0]


@functools.cache  # a communicator takes half a gigabyte of a GPU and is freed only with the world
def split(world: Group, group_size: int) -> tuple[Group, Group | None]:
    """Returns this rank's group of `group_size` consecutive ranks, and the group of its peers in the other groups.

    The groups are new even where the first is the whole world, so that their collectives never queue behind the
    engine's. With one group there are no peers: None. `group_size` divides the world. Later calls return the same.
    """
    groups = [list(range(first, first + group_size)) for first in range(0, world.size, group_size)]
    own = _new_group(world, groups)
    if len(groups) == 1:
        return own, None
    return own, _new_group(world, [list(range(place, world.size, group_size)) for place in range(group_size)])


def first_ranks(world: Group, size: int) -> Group | None:
    """Returns a new group of ranks 0 … size - 1, None on the others. Collective over the world."""
    handle = dist.new_group(ranks=list(range(size)), timeout=_TIMEOUT)
    return Group(handle, world.rank, size, world.device) if world.rank < size else None


def _new_group(world: Group, groups: list[list[int]]) -> Group:
    """Returns which of these disjoint groups holds this rank; every rank of the world creates all of them, in order."""
    handles = [dist.new_group(ranks=ranks, timeout=_TIMEOUT) for ranks in groups]
    ranks, handle = next((r, h) for r, h in zip(groups, handles, strict=True) if world.rank in r)
    return Group(handle, ranks.index(world.rank), len(ranks), world.device)


def set_timeouts(seconds: float = _TIMEOUT.total_seconds()) -> None:
    """Sets the timeout of every group, including those that DeepSpeed created."""
    for group in list(dist.distributed_c10d._world.pg_map):
        _set_timeout(timedelta(seconds=seconds), group)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank has exited: of a collective, or of the store in which ranks meet.

    Each later group, DeepSpeed's own included, meets in that store again.
    """
    signs = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe", "connectFullMesh failed")
    is_sign = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return is_sign or isinstance(error, (dist.DistNetworkError, dist.DistStoreError))


def finalize() -> None:
    """Leaves the world if this process has joined it."""
    split.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
