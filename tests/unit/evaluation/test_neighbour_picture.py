"""The neighbours' picture says what its rows say."""

from pathlib import Path

import numpy as np
from PIL import Image

from instance_ssl.evaluation.neighbour_picture import (
    OTHER_CLASS,
    SAME_CLASS,
    NeighbourRow,
    draw_neighbours,
)


def _row(verdicts: list[bool]) -> NeighbourRow:
    image = Image.new("L", (8, 8), 128)
    return NeighbourRow(image, {"raw pixels": [(image, verdict) for verdict in verdicts]})


def _frame_pixels(path: Path, colour: tuple[int, int, int], rows: slice) -> int:
    return int((np.asarray(Image.open(path))[rows] == colour).all(axis=2).sum())


def test_frames_tell_whether_the_class_is_the_querys(tmp_path: Path) -> None:
    path = tmp_path / "neighbours.png"
    draw_neighbours(path, [_row([True, False, False])], thumbnail_pixels=20)
    pictures = slice(90, -40)  # between header and legend
    one_frame = 26 * 26 - 20 * 20
    assert _frame_pixels(path, SAME_CLASS, pictures) == one_frame
    assert _frame_pixels(path, OTHER_CLASS, pictures) == 2 * one_frame


def test_small_images_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    path = tmp_path / "neighbours.png"
    pattern = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("RGB")
    blue = Image.new("RGB", (1, 1), (0, 0, 255))
    pattern.paste(blue, (0, 0))
    draw_neighbours(path, [NeighbourRow(pattern, {})], thumbnail_pixels=30)
    assert _frame_pixels(path, (0, 0, 255), slice(None)) == 15 * 15


def test_images_keep_their_aspect(tmp_path: Path) -> None:
    path = tmp_path / "neighbours.png"
    draw_neighbours(path, [NeighbourRow(Image.new("RGB", (100, 50), (0, 0, 255)), {})], thumbnail_pixels=30)
    assert _frame_pixels(path, (0, 0, 255), slice(None)) == 30 * 15
