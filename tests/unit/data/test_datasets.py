"""Instance ids are stable, splits are disjoint, and every mistake is one line that names its key or file."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from instance_ssl.data.datasets import open_source
from instance_ssl.data.folders import Ignored
from instance_ssl.data.image_sources import ArrayImages, ImageSource, write_instances
from instance_ssl.errors import RankError, UserError


def open_files(kind: str, root: Path | None, split: str = "train", **keywords: Any) -> ImageSource:
    return open_source(kind, split, root=root, **({"list_file": None, "limit": None} | keywords))


def save(path: Path, side: int = 8, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path)
    return path


def refused(*words: str, kind: str, root: Path | None, **keywords: Any) -> None:
    with pytest.raises(UserError) as raised:
        open_files(kind, root, **keywords)
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("train/b/1.png", "train/a/2.JPEG", "train/a/deep/0.webp", "val/a/0.jpg", "val/b/0.jpg"):
        save(tmp_path / name)
    return tmp_path


def test_digits_are_split_as_scikit_learn_would_and_labelled() -> None:
    train = open_files("digits", None)
    test = open_files("digits", None, split="test")
    assert (len(train), len(test)) == (1437, 360)
    rows = [int(name.split("/")[2]) for name in [*train.names, *test.names]]
    assert sorted(rows) == list(range(1797))
    assert train.names[0].startswith("digits/train/")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, targets = load_digits(return_X_y=True)
    assert train.labels is not None
    assert test.labels is not None
    assert torch.cat([train.labels, test.labels]).tolist() == targets[rows].tolist()
    expected_train, expected_test = train_test_split(range(1797), test_size=360, random_state=0)
    assert rows == [*sorted(expected_train), *sorted(expected_test)]
    image = train.load(5)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    expected = np.rint(grey[rows[5]].reshape(8, 8) / 16 * 255)
    assert all(np.array_equal(np.asarray(image)[..., channel], expected) for channel in range(3))


def test_array_digest_changes_with_a_pixel_and_with_the_shape() -> None:
    pixels = np.zeros((2, 4, 2, 3), np.uint8)
    digest = ArrayImages(pixels, ["0", "1"], None, None).digest
    assert ArrayImages(pixels.reshape(2, 2, 4, 3), ["0", "1"], None, None).digest != digest
    changed = pixels.copy()
    changed[1, 3, 1, 2] = 1
    assert ArrayImages(changed, ["0", "1"], None, None).digest != digest
    assert ArrayImages(pixels.copy(), ["0", "1"], None, None).digest == digest


def test_file_ids_do_not_depend_on_creation_order(tmp_path: Path) -> None:
    names = ["b.png", "a/z.jpg", "a-b/c.PNG", "B.jpeg", "a/b/1.webp"]
    for order, root in ((names, tmp_path / "one"), (names[::-1], tmp_path / "two")):
        for name in order:
            save(root / name)
    one, two = open_files("folder", tmp_path / "one"), open_files("folder", tmp_path / "two")
    assert one.names == sorted(names) == two.names
    assert one.digest == two.digest


def test_file_digest_changes_with_a_size_and_with_a_name(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    first = open_files("folder", tmp_path).digest
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    renamed = open_files("folder", tmp_path).digest
    save(tmp_path / "b.png", side=64)
    assert len({first, renamed, open_files("folder", tmp_path).digest}) == 3


def test_links_are_followed_once_and_hidden_or_foreign_files_skipped(tmp_path: Path) -> None:
    save(tmp_path / "store/outside/1.png")
    root = tmp_path / "root"
    for name in ("a/0.png", ".hidden.png", ".cache/0.png"):
        save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "a/loop").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "store/outside")
    (root / "c").symlink_to(tmp_path / "store/outside")
    assert open_files("folder", root).names == ["a/0.png", "b/1.png"]


def test_tree_labels_follow_the_sorted_class_folders(tree: Path) -> None:
    train, test = open_files("tree", tree), open_files("tree", tree, split="test")
    assert train.names == ["train/a/2.JPEG", "train/a/deep/0.webp", "train/b/1.png"]
    assert train.labels is not None
    assert train.labels.tolist() == [0, 0, 1]
    assert train.labels.dtype == torch.int64
    assert train.class_names == test.class_names == ["a", "b"]
    assert test.names == ["val/a/0.jpg", "val/b/0.jpg"]
    (tree / "val").rename(tree / "test")
    assert open_files("tree", tree, split="test").names == ["test/a/0.jpg", "test/b/0.jpg"]


def test_tree_refuses_disagreeing_empty_or_missing_class_folders(tree: Path) -> None:
    save(tree / "val/c/0.jpg")
    refused("data.root", "'c'", "not in train", kind="tree", root=tree, split="test")
    save(tree / "train/aa/0.jpg")
    refused("'aa'", "not in val", kind="tree", root=tree, split="test")
    (tree / "train/d").mkdir()
    refused("train/d", "holds no image", kind="tree", root=tree)
    save(tree / "train/stray.png")
    refused("train/stray.png", "class folder", kind="tree", root=tree)
    refused("data.root", "no train folder", kind="tree", root=tree / "train")


def test_list_keeps_the_order_of_the_file_and_finds_its_root(tmp_path: Path) -> None:
    for name in ("data/a.png", "data/b.png", "data/sub/c.jpg"):
        save(tmp_path / name)
    list_file = tmp_path / "data" / "images.txt"
    list_file.write_text("# chosen\nsub/c.jpg\n\n  ./a.png  \r\nb.png")
    source = open_files("list", None, list_file=list_file)
    assert source.names == ["sub/c.jpg", "a.png", "b.png"]
    assert source.labels is None
    list_file.write_text("data/b.png\n")
    assert open_files("list", tmp_path, list_file=list_file).names == ["data/b.png"]


def test_list_errors_name_the_key_and_the_line(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    list_file = tmp_path / "images.txt"
    for text, words in (
        ("a.png\n\n./a.png\n", ("line 3", "line 1", "a.png")),
        ("a.png\nb.png\n", ("line 2", "b.png")),
        ("# nothing\n", ("lists no image",)),
    ):
        list_file.write_text(text)
        refused("data.list_file", *words, kind="list", root=None, list_file=list_file)
    refused("data.list_file", "none.txt", "No such file", kind="list", root=None, list_file=tmp_path / "none.txt")
    refused("data.list_file", "not set", kind="list", root=tmp_path)


def test_missing_and_empty_folders_and_test_splits_are_refused(tmp_path: Path) -> None:
    for kind in ("tree", "folder"):
        refused("data.root", "none", "not a folder", kind=kind, root=tmp_path / "none")
    for kind in ("tree", "folder", "cifar10", "cifar100"):
        refused("data.root", "not set", kind, kind=kind, root=None)
    refused("data.root", str(tmp_path), "holds no", kind="folder", root=tmp_path)
    for kind in ("folder", "list"):
        refused("no labels", "cifar10", "tree", kind=kind, root=tmp_path, split="test")


def test_limit_keeps_evenly_spaced_images_or_names_its_key() -> None:
    whole, some = open_files("digits", None, split="test"), open_files("digits", None, split="test", limit=7)
    kept = [i * 360 // 7 for i in range(7)]
    assert some.names == [whole.names[i] for i in kept]
    assert some.labels is not None
    assert whole.labels is not None
    assert some.labels.tolist() == whole.labels[kept].tolist()
    assert np.array_equal(np.asarray(some.load(3)), np.asarray(whole.load(kept[3])))
    refused("data.limit_test", "361", "360", kind="digits", root=None, split="test", limit=361)
    refused("data.limit_train", "1437", kind="digits", root=None, limit=0)


@pytest.mark.parametrize("content", [b"", b"not an image", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", None])
def test_foreign_empty_and_vanished_files_are_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path / "a.jpg")
    if content is None:
        (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    else:
        (tmp_path / "broken.jpg").write_bytes(content)
    refused(str(tmp_path / "broken.jpg"), kind="folder", root=tmp_path)


def test_a_link_to_itself_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    refused("self.jpg", kind="folder", root=tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bound", [60, 20])
def test_too_many_pixels_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    save(tmp_path / "bomb.png", side=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
    refused("bomb.png", "pixels", kind="folder", root=tmp_path)


def test_a_truncated_or_vanished_file_fails_at_load_by_name(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-2000])
    source = open_files("folder", tmp_path)
    with pytest.raises(RankError, match=r"cut\.jpg.*truncated"):
        source.load(0)
    (tmp_path / "cut.jpg").unlink()
    with pytest.raises(RankError, match=r"cut\.jpg.*No such file"):
        source.load(0)


def test_every_mode_loads_as_rgb(tmp_path: Path) -> None:
    grey16 = np.full((4, 6), 200 << 8, np.uint16)
    for name, image in (
        ("cmyk.jpg", Image.new("CMYK", (6, 4))),
        ("grey.png", Image.new("L", (6, 4), 200)),
        ("grey16.png", Image.fromarray(grey16)),
        ("palette.png", Image.new("P", (6, 4))),
        ("rgba.png", Image.new("RGBA", (6, 4), (1, 2, 3, 0))),
    ):
        image.save(tmp_path / name)
    source = open_files("folder", tmp_path)
    images = {name: source.load(index) for index, name in enumerate(source.names)}
    assert len(images) == 5
    assert {(image.mode, image.size) for image in images.values()} == {("RGB", (6, 4))}
    assert images["grey16.png"].getpixel((0, 0)) == images["grey.png"].getpixel((0, 0)) == (200, 200, 200)
    assert images["rgba.png"].getpixel((0, 0)) == (255, 255, 255)


def test_sources_survive_pickling_without_reading_files_again(tree: Path) -> None:
    source = open_files("tree", tree)
    (tree / "train/b/1.png").unlink()
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.names, copy.digest, copy.class_names) == (source.names, source.digest, source.class_names)
    assert len(copy) == 3
    assert copy.load(0).size == (8, 8)


def test_cifar_that_cannot_be_fetched_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CIFAR10) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    refused("data.root", str(tmp_path), "cifar-10-python.tar.gz", "no route", kind="cifar10", root=tmp_path)
    refused("cifar-100-python.tar.gz", "cifar-100-python/", kind="cifar100", root=tmp_path, split="test")
    (tmp_path / "cifar-10-batches-py").mkdir()
    refused("data.root", "delete", "cifar-10-batches-py", "corrupted", kind="cifar10", root=tmp_path)


def test_cifar_files_are_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    planes = np.zeros((4, 3, 32, 32), np.uint8)
    planes[2, 0] = 255
    batch = {"data": planes.reshape(4, -1), "labels": [3, 1, 0, 2]}
    for name, content in (("batch", batch), ("meta", {"label_names": list("wxyz")})):
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "train_list", [["batch", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    source = open_files("cifar10", tmp_path, limit=2)
    assert source.names == ["cifar10/train/0", "cifar10/train/2"]
    assert source.labels is not None
    assert source.labels.tolist() == [3, 0]
    assert source.class_names == list("wxyz")
    assert source.load(1).getpixel((5, 9)) == (255, 0, 0)


def test_instance_file_has_one_line_an_image(tmp_path: Path) -> None:
    save(tmp_path / "images/new\nline.png")
    save(tmp_path / "images/plain.png")
    source = open_files("folder", tmp_path / "images")
    write_instances(source, tmp_path / "instances.txt")
    assert (tmp_path / "instances.txt").read_text() == "new\\nline.png\nplain.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "instances.txt"]


def run_directory(path: Path) -> None:
    """What a run leaves: its list of images, and a stage with a picture; and a picture that show_views was told to."""
    save(path / "evaluate_similarity/similarity.png")
    save(path / "views.png")
    for name in ("instances.txt", "data.json", *(f"evaluate_similarity/{name}" for name in STAGE_FILES)):
        (path / name).touch()


STAGE_FILES = ("config.yaml", "ds_config.json", "environment.json")


def test_pictures_of_runs_are_no_images(tree: Path) -> None:
    names = list(open_files("folder", tree).names)
    run_directory(tree / "train/a/runs/mine")
    run_directory(tree / "out")
    save(tree / "plan/table.png")
    for name in ("table.json", "table.md"):
        (tree / "plan" / name).touch()
    images = open_files("folder", tree)
    assert list(images.names) == names
    assert len(images.remarks) == 1
    assert "3 folders of this project's runs (first " in images.remarks[0]
    before = list(open_files("tree", tree).names)
    run_directory(tree / "train/out")
    images = open_files("tree", tree)
    assert (list(images.names), images.class_names) == (before, ["a", "b"])
    assert "2 folders" in images.remarks[0]


def test_a_run_in_the_root_itself_hides_its_stages_alone(tmp_path: Path) -> None:
    run_directory(tmp_path)
    save(tmp_path / "b/1.png")
    assert list(open_files("folder", tmp_path).names) == ["b/1.png", "views.png"]


def test_ignored_files_are_counted_by_extension(tree: Path) -> None:
    assert not open_files("folder", tree).remarks
    for name in ("a/1.bmp", "a/2.BMP", "b/x.tif", "b/y.\x1b[2Jfif", "a/none", "b/.hidden.gif"):
        (tree / "train" / name).touch()
    (tree / "notes.txt").touch()
    (line,) = open_files("folder", tree).remarks
    assert f"{tree}: 6 files that are not JPEG, PNG or WebP by name: 2 .bmp" in line
    assert all(word in line for word in ("1 .tif", "1 without extension", "1 .txt"))
    (line,) = open_files("tree", tree).remarks
    assert f"{tree}/train: 5 files" in line
    (tree / "train/c").mkdir()
    (tree / "train/c/1.avif").touch()
    (tree / "only").mkdir()
    (tree / "only/1.jfif").touch()
    refused("class folder", "train/c holds no image", "1 .avif", kind="tree", root=tree)
    refused("holds no .jpeg", "1 .jfif", kind="folder", root=tree / "only")


def test_the_count_of_ignored_files_stays_short(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    for number in range(30):
        (tmp_path / f"frame.{number:06d}").touch()
    (line,) = open_files("folder", tmp_path).remarks
    assert line.endswith("22 of other extensions")
    ignored = Ignored()
    for number in range(5000):
        ignored.add_file(f"frame.{number:06d}{'x' * 200}")
    assert len(ignored.files) <= 1001
    assert ignored.files.total() == 5000
    assert len(ignored.remarks(tmp_path)[0]) < 400
