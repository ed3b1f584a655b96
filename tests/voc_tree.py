"""A small VOCdevkit of the tests' own: bright squares (`cat`) and wide bars (`dog`) on dark noise."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


def object_xml(name: str, box: tuple[float, ...], difficult: bool = False) -> str:
    """One object; the box in VOC's pixels, counted from 1 with both ends inside."""
    corners = "".join(
        f"<{corner}>{value}</{corner}>" for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox></object>"


def add_image(root: Path, name: str, pixels: np.ndarray, *objects: str, folder: str = "VOC2007") -> None:
    """An image (H, W, 3) uint8 and its annotation."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (root / folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")


def write_list(root: Path, name: str, images: list[str], folder: str = "VOC2007") -> None:
    """ImageSets/Main/<name>.txt."""
    (root / folder / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))


def make_tree(root: Path, train: int = 6, test: int = 5) -> Path:
    """`train` and `test` images of 96 x 64 pixels, one cat and one dog in each."""
    random = np.random.RandomState(0)
    names = [f"{number:06d}" for number in range(train + test)]
    for name in names:
        pixels = random.randint(0, 60, (64, 96, 3)).astype(np.uint8)
        x, y = random.randint(0, 20), random.randint(0, 40)
        pixels[y : y + 22, x : x + 22] = (250, 60, 40)
        u, v = random.randint(45, 55), random.randint(0, 50)
        pixels[v : v + 12, u : u + 36] = (40, 90, 250)
        boxes = (x + 1, y + 1, x + 22, y + 22), (u + 1, v + 1, u + 36, v + 12)
        add_image(root, name, pixels, *(object_xml(kind, box) for kind, box in zip(CLASSES, boxes, strict=True)))
    write_list(root, "train", names[:train])
    write_list(root, "test", names[train:])
    return root
