"""A packed set is the same data set: ids, names, labels and pixels; stopped anywhere, it goes on."""

import errno
import hashlib
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from image_files import encoded, write_tar
from PIL import Image
from processes import run_bare

from instance_ssl.data import pack as packing_module
from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import EncodedImages
from instance_ssl.data.pack import PackedSet, Packing, pack_images
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.errors import UserError

NAMES = ["a/1.jpg", "a/x.y.jpg", "a/x.z.png", "b/ü\n.webp", "b/\udcff.JPEG", "c/6.png"]


def opened(kind: str, root: Path, split: str = "train") -> EncodedImages:
    source = open_source(kind, split, root=root, list_file=None, limit=None)
    assert isinstance(source, EncodedImages)
    return source


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "tree/train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, path.suffix.lower().replace(".jpeg", ".jpg"), side=40))
    return tmp_path / "tree"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_a_copy_has_the_ids_names_labels_bytes_and_digest_of_its_source(tree: Path, tmp_path: Path) -> None:
    source = opened("tree", tree)
    record = pack_images(source, tmp_path / "out/train", Packing(size=0, shard_mib=0.01, workers=2), OnBroken())
    packed = opened("tar", tmp_path / "out")
    assert packed.names == source.names
    assert packed.digest == source.digest
    assert packed.class_names == source.class_names == ["a", "b", "c"]
    assert packed.labels is not None
    assert source.labels is not None
    assert packed.labels.tolist() == source.labels.tolist()
    assert [packed.read(i) for i in range(6)] == [source.read(i) for i in range(6)]
    assert len(record.shards) > 1
    assert record.shards == contents(tmp_path / "out/train")
    assert record.num_images == 6


def test_images_are_shrunk_to_their_short_side_and_never_enlarged(tree: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 30), (200, 10, 10)).save(tree / "train/c/7.png")
    Image.new("RGB", (9, 5), (10, 10, 200)).save(tree / "train/c/8.png")
    small = encoded(9, side=10)
    (tree / "train/c/9.jpg").write_bytes(small)
    source = opened("tree", tree)
    pack_images(source, tmp_path / "out/train", Packing(size=16, quality=95), OnBroken())
    packed = opened("tar", tmp_path / "out")
    assert packed.names == source.names
    sizes = [packed.load(i).size for i in range(9)]
    assert sizes == [(16, 16)] * 6 + [(32, 16), (9, 5), (10, 10)]
    assert all(packed.read(i)[:3] == b"\xff\xd8\xff" for i in range(9))
    assert packed.read(8) == small  # not encoded a second time
    red, _, blue = packed.load(6).getpixel((16, 8))
    assert (abs(red - 200) < 8, abs(blue - 10) < 8) == (True, True)


def test_what_is_finished_is_not_done_again_and_no_half_shard_has_a_final_name(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, how = opened("tree", tree), Packing(size=0, shard_mib=0.004)
    clean, out = tmp_path / "clean/train", tmp_path / "out/train"
    pack_images(source, clean, how, OnBroken())
    add = packing_module._add

    def dying(tar: object, name: str, content: bytes) -> None:
        if name == "train/b/ü\n.webp":
            os._exit(9)
        add(tar, name, content)  # type: ignore[arg-type]

    monkeypatch.setattr(packing_module, "_add", dying)
    with pytest.raises(UserError, match="killed"):
        pack_images(source, out, how, OnBroken())
    monkeypatch.setattr(packing_module, "_add", add)
    done = contents(out)
    assert 0 < len(done) < len(contents(clean))
    assert done.items() <= contents(clean).items()
    with pytest.raises(UserError, match="only in part"):
        opened("tar", out.parent)
    before = {name: (out / name).stat().st_mtime_ns for name in done}
    for other in (Packing(size=16, shard_mib=0.004), Packing(size=0, shard_mib=1)):
        with pytest.raises(UserError, match="another folder"):
            pack_images(source, out, other, OnBroken())
    pack_images(source, out, how, OnBroken())
    assert contents(out) == contents(clean)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == before
    assert (out / "index.json").read_text() == (clean / "index.json").read_text()
    assert not list(out.glob(".*"))


def test_images_that_cannot_be_decoded_follow_the_policy(tree: Path, tmp_path: Path) -> None:
    whole = (tree / "train/a/1.jpg").read_bytes()
    (tree / "train/a/1.jpg").write_bytes(whole[:-400])
    source, how = opened("tree", tree), Packing(size=16)
    with pytest.raises(UserError, match=r"a/1\.jpg.*truncated"):
        pack_images(source, tmp_path / "refused/train", how, OnBroken())
    with pytest.raises(UserError, match=r"1 of 6.*max_broken_share.*a/1\.jpg"):
        pack_images(source, tmp_path / "few/train", how, OnBroken(skip=True, max_share=0.1))
    record = pack_images(source, tmp_path / "out/train", how, OnBroken(skip=True, max_share=0.2))
    assert record.left_out == 1
    assert (tmp_path / "out/train/left_out.txt").read_text().startswith("train/a/1.jpg: cannot decode")
    packed = opened("tar", tmp_path / "out")
    assert packed.names == source.names[1:]


@pytest.mark.parametrize("fault", ["wide", "encoder", "memory", "gone"])
def test_an_image_that_cannot_be_packed_is_named_and_not_the_output(
    fault: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its header is read when the set is opened; what fails later must not be called a fault of the output."""
    victim = tree / "train/c/7.png"
    Image.new("RGB", (66_000 if fault == "wide" else 3, 2)).save(victim)
    source = opened("tree", tree)
    save = Image.Image.save

    def failing(image: Image.Image, *arguments: object, **options: object) -> None:
        if image.size == (3, 2):
            raise MemoryError if fault == "memory" else OSError("broken data stream when writing image file")
        save(image, *arguments, **options)  # type: ignore[arg-type]

    if fault == "gone":
        victim.unlink()
    elif fault != "wide":
        monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(UserError, match=r"c/7\.png: ") as caught:
        pack_images(source, tmp_path / "refused/train", Packing(size=16), OnBroken())
    assert "--output" not in str(caught.value)
    if fault == "wide":
        assert "66000 x 2 pixels" in str(caught.value)
    record = pack_images(source, tmp_path / "out/train", Packing(size=16), OnBroken(skip=True, max_share=0.2))
    assert (record.left_out, record.num_images) == (1, 6)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_fault_of_the_output_is_still_called_that(
    code: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(tar: object, name: str, content: bytes) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(packing_module, "_add", failing)
    with pytest.raises(UserError) as caught:
        pack_images(opened("tree", tree), tmp_path / "out/train", Packing(size=16), OnBroken(skip=True, max_share=1))
    why = "no space left in" if code == errno.ENOSPC else os.strerror(code)
    assert str(caught.value).startswith(f"--output {tmp_path}/out/train: {why}")


def test_a_packed_set_with_a_shard_too_few_or_too_many_is_refused(tree: Path, tmp_path: Path) -> None:
    pack_images(opened("tree", tree), tmp_path / "out/train", Packing(size=0, shard_mib=0.004), OnBroken())
    first = tmp_path / "out/train/shard-000000.tar"
    (tmp_path / "out/train/another.tar").write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"another\.tar is not in the record"):
        opened("tar", tmp_path / "out")
    (tmp_path / "out/train/another.tar").unlink()
    first.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar is absent"):
        opened("tar", tmp_path / "out")


def test_a_label_in_a_packed_set_is_that_of_the_image_before_it(tmp_path: Path) -> None:
    """As packing has written them from the first: a label is named up to the first dot of its image's name."""
    names = {"x.y.jpg": 2, "x.z.png": 0, "x.jpg": 1, "x": 2}
    members = []
    for number, (name, label) in enumerate(names.items()):
        members += [(f"a/{name}", encoded(number)), ("a/x.cls", b"%d\n" % label)]
    write_tar(tmp_path / "train/shard-000000.tar", members)
    record = PackedSet({"shard-000000.tar": ""}, "", 4, ["b", "c", "d"], "", 0, 90, 0)
    (tmp_path / "train/index.json").write_text(
        json.dumps({"format": "instance_ssl packed images, version 1", **asdict(record)})
    )
    packed = opened("tar", tmp_path)
    assert packed.names == [f"a/{name}" for name in names]
    assert packed.labels is not None
    assert packed.labels.tolist() == list(names.values())
    assert packed.class_names == ["b", "c", "d"]
    assert packed.remarks == []


def test_classes_of_a_tar_keep_their_names_when_packed(tmp_path: Path) -> None:
    for split, labels in (("train", (500, 30)), ("val", (500,))):
        members = [(f"{i}{end}", encoded(i) if end == ".jpg" else b"%d" % label)
                   for i, label in enumerate(labels) for end in (".jpg", ".cls")]  # fmt: skip
        write_tar(tmp_path / f"plain/{split}-0.tar", members)
    pack_images(opened("tar", tmp_path / "plain"), tmp_path / "out/train", Packing(size=0), OnBroken())
    (tmp_path / "out/val-0.tar").write_bytes((tmp_path / "plain/val-0.tar").read_bytes())
    train, test = opened("tar", tmp_path / "out"), opened("tar", tmp_path / "out", "test")
    assert train.class_names == test.class_names == ["30", "500"]
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.tolist() == [1, 0]
    assert test.labels.tolist() == [1]


def test_the_runner_packs_both_splits_and_says_what_is_wrong_in_one_line(tree: Path, tmp_path: Path) -> None:
    (tree / "val").symlink_to(tree / "train")
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"kind": "tree", "root": str(tree)}}))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return run_bare("pack_dataset", "--config", str(tmp_path / "config.yaml"), *words)

    out = str(tmp_path / "out")
    done = run("--output", out, "--size", "16", "--split", "test")
    assert done.returncode == 0, done.stderr
    assert "6 images in 1 shards" in done.stdout
    assert len(list((tmp_path / "out/val").glob("*.tar"))) == 1
    wrong = run("--output", out, "--size", "-1")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--size -1" in wrong.stderr
