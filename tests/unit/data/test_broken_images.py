"""Every odd image file is either read right, or found when the data set is opened and refused or left out by name."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import broken_files, encoded
from PIL import Image

from instance_ssl.data.datasets import open_source
from instance_ssl.data.image_sources import EncodedImages
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.errors import RankError, UserError

SKIP = OnBroken(skip=True, max_share=0.9)


def opened(root: Path | None, kind: str = "folder", on_broken: OnBroken = SKIP, **keywords: Any) -> EncodedImages:
    source = open_source(
        kind, "train", root=root, on_broken=on_broken, **({"list_file": None, "limit": None} | keywords)
    )
    assert isinstance(source, EncodedImages)
    return source


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good files a, c, e … among broken ones."""
    root = tmp_path / "mixed"
    root.mkdir()
    for number, (name, content) in enumerate(broken_files().items()):
        (root / f"{name[0]}-{name}").write_bytes(content)
        (root / f"{name[0]}.jpg").write_bytes(encoded(number))
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    return root


def test_broken_files_are_left_out_before_ids_are_given(mixed: Path) -> None:
    source = opened(mixed)
    assert source.names == ["b.jpg", "e.jpg", "g.jpg", "n.jpg", "t.jpg"]
    assert [source.read(i) for i in range(5)] == [encoded(i) for i in range(5)]
    assert {source.load(i).size for i in range(5)} == {(8, 8)}
    reasons = dict(line.split(": ", 1) for line in source.left_out)
    assert list(reasons) == [
        "b-bomb.png", "e-empty.jpg", "g-gif.jpg", "gone.jpg", "n-nothing.png", "self.jpg", "t-text.webp",
    ]  # fmt: skip
    assert "pixels" in reasons["b-bomb.png"]
    assert "empty" in reasons["e-empty.jpg"]
    assert "No such file" in reasons["gone.jpg"]
    assert "symbolic links" in reasons["self.jpg"]
    assert source.digest == opened(mixed).digest


def test_the_first_one_is_an_error_unless_told_and_too_many_are_one_in_any_case(mixed: Path) -> None:
    with pytest.raises(UserError, match=r"b-bomb\.png.*data\.on_broken") as refused:
        opened(mixed, on_broken=OnBroken())
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"7 of 12 images.*max_broken_share 0\.5.*b-bomb\.png.*and 2 more"):
        opened(mixed, on_broken=OnBroken(skip=True, max_share=0.5))


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    for number, name in enumerate(("a/0.png", "a/1.png", "b/2.png", "c/3.png")):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"" if number == 1 else encoded(number, ".png"))
    source = opened(tmp_path, "tree")
    assert source.names == ["train/a/0.png", "train/b/2.png", "train/c/3.png"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2]
    assert opened(tmp_path, "tree", limit=2).names == ["train/a/0.png", "train/b/2.png"]


def test_a_line_of_a_list_that_is_no_file_is_left_out_too(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(encoded(1))
    (tmp_path / "list.txt").write_text("0.jpg\n1.jpg\n")
    source = opened(None, "list", list_file=tmp_path / "list.txt")
    assert source.names == ["1.jpg"]
    assert source.left_out == ["0.jpg: No such file or directory"]


def test_a_file_that_may_not_be_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(number))
    # Root may read any file, so the refusal is the test's.
    monkeypatch.setattr("instance_ssl.data.unreadable_images.open_image", _forbidding(tmp_path / "1.jpg"))
    source = opened(tmp_path)
    assert source.names == ["0.jpg", "2.jpg"]
    assert source.left_out == ["1.jpg: Permission denied"]
    with pytest.raises(UserError, match=r"1\.jpg: Permission denied"):
        opened(tmp_path, on_broken=OnBroken())


def _forbidding(path: Path) -> Any:
    from instance_ssl.data.decode import open_image

    def open_or_not(file: Path) -> Image.Image:
        if file == path:
            raise PermissionError(13, "Permission denied", str(path))
        return open_image(file)

    return open_or_not


def test_newlines_and_odd_bytes_in_names_stay_in_one_line(tmp_path: Path) -> None:
    for name in ("new\nline.jpg", "\udcff.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "ü.jpg").write_bytes(encoded(0))
    source = opened(tmp_path)
    assert source.names == ["ü.jpg"]
    assert source.left_out == ["new\\nline.jpg: the file is empty", "\\udcff.jpg: the file is empty"]


def test_what_only_decoding_shows_is_said_by_name(tmp_path: Path) -> None:
    whole = encoded(0, side=64)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "vanishing.jpg").write_bytes(whole)
    source = opened(tmp_path)
    (tmp_path / "vanishing.jpg").unlink()
    for index, words in enumerate(("cut.jpg (image 0)", "vanishing.jpg (image 1): No such file")):
        with pytest.raises(RankError) as failed:
            source.load(index)
        assert words in str(failed.value)
        assert "\n" not in str(failed.value)


def bytes_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return bytes_of(image, "PNG", transparency=1)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    return bytes_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)


# Name → (file, size, colour of its first pixel, how far off that may be).
ODD = {
    "cmyk.jpg": (bytes_of(Image.new("CMYK", (16, 8), (0, 255, 255, 0)), "JPEG"), (16, 8), (255, 0, 0), 4),
    "grey16.png": (bytes_of(Image.fromarray(np.full((3, 5), 200 << 8 | 255, np.uint16)), "PNG"), (5, 3), (200,) * 3, 0),
    "grey.jpg": (bytes_of(Image.new("L", (8, 8), 90), "JPEG"), (8, 8), (90, 90, 90), 2),
    "one bit.png": (bytes_of(Image.new("1", (3, 3), 1), "PNG"), (3, 3), (255, 255, 255), 0),
    "grey and alpha.png": (bytes_of(Image.new("LA", (3, 3), (70, 255)), "PNG"), (3, 3), (70, 70, 70), 0),
    "palette.png": (palette_with_transparency(), (4, 3), (255, 255, 255), 0),
    "alpha.webp": (
        bytes_of(Image.new("RGBA", (4, 4), (9, 99, 199, 255)), "WEBP", lossless=True),
        (4, 4),
        (9, 99, 199),
        0,
    ),
    "animated.png": (animated("PNG"), (6, 4), (250, 0, 0), 0),
    "animated.webp": (animated("WEBP"), (6, 4), (250, 0, 0), 0),
    "one pixel.png": (bytes_of(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), (1, 1), (1, 2, 3), 0),
    "a PNG.jpg": (bytes_of(Image.new("RGB", (2, 2), (4, 5, 6)), "PNG"), (2, 2), (4, 5, 6), 0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_readable_images_have_their_colours(tmp_path: Path, name: str) -> None:
    content, size, colour, tolerance = ODD[name]
    (tmp_path / name).write_bytes(content)
    image = opened(tmp_path, on_broken=OnBroken()).load(0)
    assert (image.mode, image.size) == ("RGB", size)
    pixel = np.asarray(image).astype(int)[0, 0]
    assert np.abs(pixel - colour).max() <= tolerance, pixel


def test_many_headers_are_checked_over_several_tasks(tmp_path: Path) -> None:
    content = encoded(0)
    for number in range(600):
        (tmp_path / f"{number:03d}.jpg").write_bytes(b"" if number in (0, 255, 256, 599) else content)
    source = opened(tmp_path)
    assert [line.split(":")[0] for line in source.left_out] == ["000.jpg", "255.jpg", "256.jpg", "599.jpg"]
    assert len(source) == 596
    assert source.names[255] == "258.jpg"
    assert os.path.getsize(tmp_path / "258.jpg") == source.columns["sizes"][255]
