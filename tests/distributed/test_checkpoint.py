"""Checkpoints: free of the number of ranks, whole or not there, verified before they are read."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.checkpoint.directory import DirectoryWriter
from instance_ssl.checkpoint.state import TrainingPosition, load_encoder, load_rows, newest_checkpoint, start_checkpoint
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError

N, D, K = 65, 4, 3


def make_shard(group: Group, num_instances: int = N) -> ClassifierShard:
    options = SoftmaxOptions(temperature=0.15, form="mixture", block_bytes=1000, matmul_dtype=torch.float32)
    shard = ClassifierShard(num_instances, D, group, options, smoothing_factor=0.2)
    rows = torch.arange(num_instances * D, dtype=torch.float32).view(num_instances, D)
    shard.weight.copy_(rows[shard.start : shard.stop])
    shard.momentum_buffer.copy_(-rows[shard.start : shard.stop])
    return shard


def save_checkpoint(
    parent: Path, position: TrainingPosition, state: dict[str, Tensor], momentum: dict[str, Tensor],
    shard: ClassifierShard, world: Group, *, keep: int,
) -> Path:  # fmt: skip
    writer = DirectoryWriter(parent, world, keep=keep, is_permanent=lambda step: step % 70 == 0)
    start_checkpoint(writer, position, state, momentum, {}, shard, world)
    return writer.commit()


def write(group: Group, parent: Path, steps: list[int], keep: int = 2) -> None:
    shard = make_shard(group)
    shard.refresh_hard_classes(K)
    for step in steps:
        shard.weight.add_(1)
        position = TrainingPosition(step, step // 10, N, D)
        save_checkpoint(
            parent, position, {"w": torch.full((2,), step)}, {"w": torch.ones(2)}, shard, shard.group, keep=keep
        )


def read(group: Group, parent: Path) -> tuple[int, Tensor, Tensor, Tensor, Tensor] | None:
    checkpoint = newest_checkpoint(parent, group)
    if checkpoint is None:
        return None
    shard = make_shard(group)
    load_rows(checkpoint, shard)
    assert shard.hard_classes is not None
    state, _ = load_encoder(checkpoint)
    return checkpoint.position.step, shard.weight, shard.momentum_buffer, shard.hard_classes, state["w"]


@pytest.mark.parametrize(("wrote", "reads"), [(2, 1), (1, 2), (2, 3), (4, 2)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, wrote: int, reads: int) -> None:
    run_ranks(write, wrote, tmp_path, [10])
    (expected,) = run_ranks(read, 1, tmp_path)
    results = run_ranks(read, reads, tmp_path)
    for index in (1, 2, 3):
        assert torch.equal(torch.cat([r[index] for r in results]), expected[index])
    assert all(r[0] == 10 and r[4].tolist() == [10, 10] for r in results)


def test_nothing_to_read_is_none(tmp_path: Path) -> None:
    assert run_ranks(read, 2, tmp_path / "absent") == [None, None]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run_ranks(write, 2, tmp_path, [10, 20, 30])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000020", "step_000000030"]


@pytest.mark.parametrize("victim", ["encoder.pt", "rows_000000000_000000033.pt", "training.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, victim: str, damage: str) -> None:
    run_ranks(write, 2, tmp_path, [10, 20])
    path = tmp_path / "step_000000020" / victim
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    (result,) = run_ranks(read, 1, tmp_path)
    assert result[0] == 10


def read_expecting_an_error(group: Group, parent: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(group, parent)
    return str(caught.value)


def test_training_does_not_start_over_when_nothing_is_whole(tmp_path: Path) -> None:
    run_ranks(write, 1, tmp_path, [10])
    (tmp_path / "step_000000010" / "encoder.pt").write_bytes(b"")
    for message in run_ranks(read_expecting_an_error, 2, tmp_path):
        assert "encoder.pt" in message


def write_where_one_rank_cannot(group: Group, parent: Path) -> str:
    shard = make_shard(group)
    if group.rank == 1:
        # A directory where the file should go: an error on this rank alone, whoever runs the test.
        blocked = parent / ".writing-step_000000020" / f"rows_{shard.start:09d}_{shard.stop:09d}.pt"
        original = Path.mkdir

        def mkdir(self: Path, *args: object, **kwargs: object) -> None:
            original(self, *args, **kwargs)  # type: ignore[arg-type]
            if self == blocked.parent:
                original(blocked)

        Path.mkdir = mkdir  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        save_checkpoint(parent, TrainingPosition(20, 2, N, D), {}, {}, shard, shard.group, keep=2)
    return str(caught.value)


def test_a_failure_on_one_rank_commits_nothing(tmp_path: Path) -> None:
    run_ranks(write, 2, tmp_path, [10])
    for message in run_ranks(write_where_one_rank_cannot, 2, tmp_path):
        assert "rank 1" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000010"]


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    run_ranks(write, 2, tmp_path, [10])
    directory = tmp_path / "step_000000010"
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {path.name for path in directory.iterdir()} - {"MANIFEST.json"}


def make_copied_shard(world: Group, group_size: int) -> ClassifierShard:
    """bfloat16 rows, recent classes, and T / group_size copies of W."""
    group, replicas = comm.split(world, group_size)
    options = SoftmaxOptions(temperature=0.15, form="mixture", block_bytes=1000, matmul_dtype=torch.float32)
    sampler = ClassSampler("recent", N, 20, seed=0)
    types = {"row_dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16}
    shard = ClassifierShard(N, D, group, options, replicas=replicas, sampler=sampler, **types)
    generator = torch.Generator().manual_seed(1)
    shard.weight.copy_(torch.randn(N, D, generator=generator)[shard.start : shard.stop])
    return shard


def step_copied_shard(world: Group, shard: ClassifierShard, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids, x_BD = torch.randperm(N, generator=generator)[:12], torch.randn(12, D, generator=generator)
    own = torch.arange(12).chunk(world.size)[world.rank]
    shard.begin_step(ids)
    shard.forward(x_BD[own], ids[own], total_rows=12)
    shard.step(0.3)


def write_copies(world: Group, parent: Path) -> Tensor:
    shard = make_copied_shard(world, group_size=2)
    for step in range(3):
        step_copied_shard(world, shard, step)
    save_checkpoint(parent, TrainingPosition(3, 1, N, D), {}, {}, shard, world, keep=1)
    step_copied_shard(world, shard, 3)
    shard.settle()
    return shard.weight


def resume_copies(world: Group, parent: Path) -> Tensor:
    shard = make_copied_shard(world, group_size=2)
    checkpoint = newest_checkpoint(parent, world)
    assert checkpoint is not None
    load_rows(checkpoint, shard)
    step_copied_shard(world, shard, 3)
    shard.settle()
    return shard.weight


def test_copies_are_written_once_and_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Step count (the seed of stochastic rounding) and recent classes are part of the state."""
    unbroken = run_ranks(write_copies, 4, tmp_path)
    rows = [path.name for path in sorted((tmp_path / "step_000000003").glob("rows_*"))]
    assert rows == ["rows_000000000_000000033.pt", "rows_000000033_000000065.pt"]
    for ours, theirs in zip(run_ranks(resume_copies, 4, tmp_path), unbroken, strict=True):
        assert torch.equal(ours, theirs)


def read_another_size(group: Group, parent: Path) -> str:
    checkpoint = newest_checkpoint(parent, group)
    assert checkpoint is not None
    with pytest.raises(UserError) as caught:
        load_rows(checkpoint, make_shard(group, N - 1))
    return str(caught.value)


def test_rows_of_another_problem_are_refused(tmp_path: Path) -> None:
    run_ranks(write, 1, tmp_path, [10])
    assert "65 x 4" in run_ranks(read_another_size, 1, tmp_path)[0]


OLD_IDS = torch.tensor([3, 0, -1, *range(N - 1, 20, -1), *[-1] * 20])


def read_other_rows(group: Group, parent: Path) -> tuple[Tensor, Tensor]:
    checkpoint = newest_checkpoint(parent, group)
    assert checkpoint is not None
    shard = make_shard(group, len(OLD_IDS))
    shard.weight.zero_()
    shard.momentum_buffer.zero_()
    load_rows(checkpoint, shard, OLD_IDS[shard.start : shard.stop])
    assert shard.hard_classes is None
    return shard.weight, shard.momentum_buffer


@pytest.mark.parametrize("reads", [1, 2, 3, 4])  # a rank of four has new rows alone
def test_rows_of_other_images_are_found_by_their_old_ids(tmp_path: Path, reads: int) -> None:
    run_ranks(write, 2, tmp_path, [10])
    _, *old, _, _ = run_ranks(read, 1, tmp_path)[0]
    results = run_ranks(read_other_rows, reads, tmp_path)
    for place, rows in enumerate(old):
        found = torch.cat([result[place] for result in results])
        assert torch.equal(found[OLD_IDS >= 0], rows[OLD_IDS[OLD_IDS >= 0]])
        assert not found[OLD_IDS < 0].any()


def make_sampled_shard(world: Group, num_instances: int) -> ClassifierShard:
    options = SoftmaxOptions(temperature=0.15, form="mixture", block_bytes=1000, matmul_dtype=torch.float32)
    sampler = ClassSampler("random", num_instances, 20, seed=0)
    return ClassifierShard(num_instances, D, world, options, sampler=sampler, weight_decay=0.1)


def grow_sampled(world: Group, parent: Path) -> tuple[Tensor, Tensor]:
    """Rows of a run that samples classes, and those of one with more classes that takes them over, settled."""
    shard = make_sampled_shard(world, N)
    shard.weight.copy_(torch.randn(N, D, generator=torch.Generator().manual_seed(1)))
    for step in range(3):
        step_copied_shard(world, shard, step)
    save_checkpoint(parent, TrainingPosition(3, 1, N, D), {}, {}, shard, world, keep=1)
    checkpoint = newest_checkpoint(parent, world)
    assert checkpoint is not None
    longer = make_sampled_shard(world, N + 20)
    old_ids = torch.cat([torch.arange(N), torch.full((20,), -1)])
    load_rows(checkpoint, longer, old_ids)
    longer.weight[N:] = 1
    longer.settle()
    shard.settle()
    return shard.weight, longer.weight


def test_new_rows_have_missed_no_step_of_a_run_that_samples(tmp_path: Path) -> None:
    before, after = run_ranks(grow_sampled, 1, tmp_path)[0]
    assert torch.equal(after[:N], before)
    assert torch.equal(after[N:], torch.ones(20, D))
