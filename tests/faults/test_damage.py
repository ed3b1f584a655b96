"""Checkpoints that were damaged or tampered with after they were written (F7 to F10, F32)."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from rig import checkpoints, digests, quick_first, run

from instance_ssl.checkpoint.state import ENCODER_FILES, newest_checkpoint
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError

FILES = ["encoder.pt", "rows_000000000_000000033.pt", "rank_00001.pt", "training.json", "MANIFEST.json"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "cut in half": cut_in_half,
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
}


def outcome(group: Group, parent: Path, cases: list[str]) -> list[str]:
    """What reading each of these directories says; "intact" where nothing."""
    said = []
    for case in cases:
        try:
            newest_checkpoint(parent / case, group)
            said.append("intact")
        except UserError as error:
            said.append(str(error))
    return said


def read_all(parent: Path, cases: list[str]) -> dict[str, str]:
    by_rank = run_ranks(outcome, 2, parent, cases)
    assert by_rank[0] == by_rank[1]
    return dict(zip(cases, by_rank[0], strict=True))


@pytest.fixture(scope="module")
def written(initialised: Path) -> Path:
    return checkpoints(initialised, "initialize_classifier")[-1]


def test_any_damage_to_any_file_is_found_before_anything_is_loaded(written: Path, tmp_path: Path) -> None:
    cases = {f"{name}, {kind}": (name, damage) for name in FILES for kind, damage in DAMAGE.items()}
    for case, (name, damage) in cases.items():
        copy = shutil.copytree(written, tmp_path / case / written.name)
        damage(copy / name)
    shutil.copytree(written, tmp_path / "untouched" / written.name)
    said = read_all(tmp_path, [*cases, "untouched"])
    assert said.pop("untouched") == "intact"
    for case, text in said.items():
        assert cases[case][0] in text, f"{case}: {text}"


def test_an_edited_or_foreign_manifest_is_found(written: Path, tmp_path: Path) -> None:
    def edit(name: str, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
        copy = shutil.copytree(written, tmp_path / name / written.name)
        manifest = json.loads((copy / "MANIFEST.json").read_text())
        change(manifest["files"])
        (copy / "MANIFEST.json").write_text(json.dumps(manifest))

    edit("size", lambda files: files["encoder.pt"].update(bytes=1))
    edit("dropped", lambda files: files.pop("rank_00000.pt"))
    copy = shutil.copytree(written, tmp_path / "added" / written.name)
    (copy / "rows_000000065_000000099.pt").write_bytes(b"more")
    copy = shutil.copytree(written, tmp_path / "outside" / written.name)
    files = {"../../passwd": {"bytes": 1, "sha256": "0"}}
    checksum = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (copy / "MANIFEST.json").write_text(json.dumps({"files": files, "checksum": checksum}))
    said = read_all(tmp_path, ["size", "dropped", "added", "outside"])
    assert "MANIFEST.json has changed" in said["size"]
    assert "MANIFEST.json has changed" in said["dropped"]
    assert "rows_000000065_000000099.pt is not in MANIFEST.json" in said["added"]
    assert "outside its directory" in said["outside"]


def test_the_run_goes_back_to_an_older_checkpoint_aloud(place: Path, clean: dict[str, str]) -> None:
    stopped = run(place, fault="step:0:6:term")
    assert stopped.wait() == [75, 75]
    flip_a_bit(checkpoints(place)[-1] / "rows_000000033_000000065.pt")
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "warning: damaged checkpoint" in resumed.text()
    assert "rows_000000033_000000065.pt has changed since it was written" in resumed.text()
    assert "5 steps in all" in resumed.text()
    assert digests(place) == clean


def test_the_run_does_not_start_over_when_nothing_is_intact(place: Path) -> None:
    stopped = run(place, fault="step:0:1:term")
    assert stopped.wait() == [75, 75]
    (broken,) = checkpoints(place)
    cut_in_half(broken / "encoder.pt")
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "encoder.pt" in refused.text()
    assert "restore one or remove the directory" in refused.text()


class Malice:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


NAMES = ["encoder.pt", "rows_000000000_000000033.pt", "rank_00000.pt"]


@pytest.mark.parametrize("name", quick_first(NAMES, lambda name: name == "rank_00000.pt"))
def test_a_pickle_in_a_checkpoint_is_not_run(place: Path, name: str) -> None:
    """The manifest is made to fit: whoever can plant the file can do that too."""
    (checkpoint,) = checkpoints(place, "initialize_classifier")
    mark = place / "mark"
    torch.save({"state": Malice(mark)}, checkpoint / name)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    content = (checkpoint / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(manifest["files"], sort_keys=True)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    refused = run(place)
    codes = refused.wait()
    assert 2 in codes, refused.text()
    assert "it holds more than tensors" in refused.text()
    assert "Traceback" not in refused.text()
    assert not mark.exists()
    torch.load(checkpoint / name, weights_only=False)  # what a plain unpickling would have done
    assert mark.exists()


def test_the_encoder_alone_needs_only_its_own_files(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / written.name)
    flip_a_bit(copy / "rows_000000000_000000033.pt")
    assert run_ranks(read_encoder, 1, tmp_path) == [written.name]


def read_encoder(group: Group, parent: Path) -> str:
    found = newest_checkpoint(parent, group, ENCODER_FILES)
    assert found is not None
    return found.directory.name
