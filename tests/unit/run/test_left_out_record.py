"""left_out.txt: what is written is read again, whatever the names, and a torn line harms nothing."""

from pathlib import Path

import numpy as np
import pytest

from instance_ssl.data.image_sources import ArrayImages
from instance_ssl.errors import UserError, unescape
from instance_ssl.run.exclusion_list import Found, append_left_out, read_left_out, record_path

NAMES = ["a.png", "line\nbreak\ttab\u2028.png", "back\\slash\udcff\x85.png", " d.png "]


def images() -> ArrayImages:
    return ArrayImages(np.zeros((4, 2, 2, 3), np.uint8), NAMES, None, None)


def test_any_name_and_reason_comes_back(tmp_path: Path) -> None:
    assert read_left_out(tmp_path, 4) == {}
    first = {1: Found(0, "cannot decode it: cut short"), 2: Found(7, "gone")}
    append_left_out(tmp_path, first, images())
    append_left_out(tmp_path, {3: Found(9, "gone\ttoo")}, images())
    assert read_left_out(tmp_path, 4) == {**first, 3: Found(9, "gone too")}
    text = record_path(tmp_path).read_text(encoding="utf-8", errors="surrogateescape")
    assert [unescape(line.split("\t", 3)[3]) for line in text.splitlines()] == NAMES[1:]


def test_a_torn_line_is_not_read_and_makes_room_for_the_next(tmp_path: Path) -> None:
    append_left_out(tmp_path, {0: Found(1, "gone")}, images())
    with record_path(tmp_path).open("a") as file:
        file.write("3\t5\tgo")
    assert read_left_out(tmp_path, 4) == {0: Found(1, "gone")}
    append_left_out(tmp_path, {2: Found(6, "gone")}, images())
    assert read_left_out(tmp_path, 4) == {0: Found(1, "gone"), 2: Found(6, "gone")}


@pytest.mark.parametrize("line", ["4\t0\tgone\tx.png\n", "-1\t0\tgone\tx.png\n", "one\t0\tgone\tx\n", "1\t0\tgone\n"])
def test_what_cannot_be_a_record_is_refused(tmp_path: Path, line: str) -> None:
    record_path(tmp_path).write_text(line)
    with pytest.raises(UserError, match=r"left_out\.txt is .*: restore it"):
        read_left_out(tmp_path, 4)


def test_a_record_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    record_path(tmp_path).mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        append_left_out(tmp_path, {0: Found(1, "gone")}, images())
