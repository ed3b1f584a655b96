"""SUN397, DTD and iNaturalist 2018 in torchvision's layouts: official lists, labels as torchvision's, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torchvision.datasets import DTD, SUN397

from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.errors import UserError


def opened(kind: str, root: Path, split: str = "train", limit: int | None = None) -> ImageSource:
    return open_source(kind, split, root=root, list_file=None, limit=limit)


def refused(kind: str, root: Path, *words: str, split: str = "train") -> None:
    with pytest.raises(UserError) as raised:
        opened(kind, root, split)
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in ("data.root", *words) if word not in message] == [], message


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def dtd(tmp_path: Path) -> Path:
    for number, part in enumerate(("val", "train", "test")):
        entries = [f"{name}/{name}_000{number}.jpg" for name in ("zigzagged", "banded")]
        for entry in entries:
            save(tmp_path / "dtd/dtd/images" / entry)
        write(tmp_path / f"dtd/dtd/labels/{part}1.txt", entries)
    return tmp_path


def test_dtd_trains_on_train_and_val_and_holds_val_out(dtd: Path) -> None:
    train, test = opened("dtd", dtd), opened("dtd", dtd, "test")
    assert [Path(name).name for name in train.names] == [
        "banded_0000.jpg", "banded_0001.jpg", "zigzagged_0000.jpg", "zigzagged_0001.jpg",
    ]  # fmt: skip
    assert train.held_out is not None
    assert train.held_out.tolist() == [0, 2]
    assert [Path(name).name for name in test.names] == ["banded_0002.jpg", "zigzagged_0002.jpg"]
    assert test.held_out is None
    assert train.load(3).size == (8, 8)
    assert train.labels is not None
    for split, ids in (("val", [0, 2]), ("train", [1, 3])):
        theirs = DTD(str(dtd), split=split)
        assert train.class_names == theirs.classes
        expected = {
            str(path.relative_to(dtd)): label for path, label in zip(theirs._image_files, theirs._labels, strict=True)
        }
        assert {train.names[i]: int(train.labels[i]) for i in ids} == expected
    few = opened("dtd", dtd, limit=2)
    assert few.held_out is not None
    assert few.held_out.tolist() == [0, 1]


def test_dtd_without_its_lists_says_what_to_unpack(dtd: Path) -> None:
    (dtd / "dtd/dtd/labels/val1.txt").unlink()
    refused("dtd", dtd, "val1.txt", "DTD")


@pytest.fixture
def sun397(tmp_path: Path) -> Path:
    folder = tmp_path / "SUN397"
    for name in ("a/abbey", "b/bank/indoor"):
        for number in range(3):
            save(folder / name / f"sun_{number}.jpg")
    write(folder / "ClassName.txt", ["/a/abbey", "/b/bank/indoor"])
    write(tmp_path / "Training_01.txt", ["/b/bank/indoor/sun_1.jpg", "/a/abbey/sun_2.jpg"])
    write(tmp_path / "Testing_01.txt", ["/a/abbey/sun_0.jpg"])
    return tmp_path


def test_sun397_follows_partition_1_wherever_it_lies(sun397: Path) -> None:
    train, test = opened("sun397", sun397), opened("sun397", sun397, "test")
    assert train.names == ["SUN397/a/abbey/sun_2.jpg", "SUN397/b/bank/indoor/sun_1.jpg"]
    assert test.names == ["SUN397/a/abbey/sun_0.jpg"]
    assert train.held_out is None
    theirs = SUN397(str(sun397))
    assert train.class_names == ["a/abbey", "b/bank/indoor"]
    expected = {
        str(path.relative_to(sun397)): label for path, label in zip(theirs._image_files, theirs._labels, strict=True)
    }
    for source in (train, test):
        assert source.labels is not None
        assert [expected[name] for name in source.names] == source.labels.tolist()
    for place in ("SUN397", "Partitions", "SUN397/Partitions"):
        (sun397 / place).mkdir(exist_ok=True)
        for name in ("Training_01.txt", "Testing_01.txt"):
            next(sun397.rglob(name)).rename(sun397 / place / name)
        assert opened("sun397", sun397).digest == train.digest


def test_sun397_errors_name_the_list(sun397: Path) -> None:
    write(sun397 / "Training_01.txt", ["/c/cave/sun_0.jpg"])
    refused("sun397", sun397, "Training_01.txt", "c/cave/sun_0.jpg")
    (sun397 / "Testing_01.txt").unlink()
    refused("sun397", sun397, "Testing_01.txt", "Partitions.zip", split="test")


@pytest.fixture
def inaturalist(tmp_path: Path) -> Path:
    categories = [{"id": 7, "name": "Corvus corax"}, {"id": 3, "name": "Abies alba"}]
    for split, offset in (("train", 0), ("val", 10)):
        images = [
            {"id": offset + i, "file_name": f"train_val2018/{folder}/{offset + i}.jpg"}
            for i, folder in enumerate(("Plantae/3", "Aves/7", "Aves/7"))
        ]
        for image in images:
            save(tmp_path / str(image["file_name"]))
        annotations = [{"image_id": offset + i, "category_id": category} for i, category in enumerate((3, 7, 7))]
        write_list(tmp_path, split, {"images": images, "annotations": annotations, "categories": categories})
    return tmp_path


def write_list(root: Path, split: str, content: Any) -> None:
    (root / f"{split}2018.json").write_text(json.dumps(content))


def test_inaturalist_follows_its_lists_in_both_layouts(inaturalist: Path) -> None:
    train, test = opened("inaturalist2018", inaturalist), opened("inaturalist2018", inaturalist, "test")
    assert [name.removeprefix("train_val2018/") for name in train.names] == [
        "Aves/7/1.jpg", "Aves/7/2.jpg", "Plantae/3/0.jpg",
    ]  # fmt: skip
    assert train.labels is not None
    assert train.labels.tolist() == [1, 1, 0]
    assert train.class_names == test.class_names == ["Abies alba", "Corvus corax"]
    assert len(test) == 3
    (inaturalist / "train_val2018").rename(inaturalist / "2018")
    theirs = opened("inaturalist2018", inaturalist)
    assert theirs.names[0] == "2018/Aves/7/1.jpg"
    assert theirs.load(0).size == (8, 8)
    assert theirs.labels is not None
    assert theirs.labels.tolist() == [1, 1, 0]


def test_inaturalist_errors_name_the_list(inaturalist: Path) -> None:
    content = json.loads((inaturalist / "val2018.json").read_text())
    content["annotations"][1]["category_id"] = 9
    write_list(inaturalist, "val", content)
    refused("inaturalist2018", inaturalist, "val2018.json", "Aves/7/11.jpg", split="test")
    write_list(inaturalist, "train", ["no list"])
    refused("inaturalist2018", inaturalist, "train2018.json", "images")
    (inaturalist / "train2018.json").write_text("{")
    refused("inaturalist2018", inaturalist, "train2018.json", "cannot be read")


def test_a_listed_image_that_is_absent_is_named(dtd: Path) -> None:
    (dtd / "dtd/dtd/images/banded/banded_0001.jpg").unlink()
    with pytest.raises(UserError, match=r"banded_0001\.jpg"):
        opened("dtd", dtd)
