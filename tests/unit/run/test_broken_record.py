"""broken.txt: what is written is read again, whatever the names, and a torn line harms nothing."""

from pathlib import Path

import pytest

from instance_ssl.errors import UserError
from instance_ssl.run.broken_record import (
    Broken,
    append_broken,
    left_out_path,
    read_broken,
    read_left_out,
    record_path,
)

NAMES = ["a.png", "line\nbreak\ttab\u2028.png", "back\\slash\udcff\x85.png", " d.png "]


def test_any_name_and_reason_comes_back(tmp_path: Path) -> None:
    assert read_broken(tmp_path) == {}
    first = {NAMES[1]: Broken(0, "cannot decode it: cut short"), NAMES[2]: Broken(7, "gone")}
    append_broken(tmp_path, first)
    append_broken(tmp_path, {NAMES[3]: Broken(9, "gone\ttoo")})
    assert read_broken(tmp_path) == {**first, NAMES[3]: Broken(9, "gone too")}


def test_a_torn_line_is_not_read_and_makes_room_for_the_next(tmp_path: Path) -> None:
    append_broken(tmp_path, {"a.png": Broken(1, "gone")})
    with record_path(tmp_path).open("a") as file:
        file.write("3\tgo")
    assert read_broken(tmp_path) == {"a.png": Broken(1, "gone")}
    append_broken(tmp_path, {"c.png": Broken(6, "gone")})
    assert read_broken(tmp_path) == {"a.png": Broken(1, "gone"), "c.png": Broken(6, "gone")}


@pytest.mark.parametrize("line", ["-1\tgone\tx.png\n", "one\tgone\tx\n", "1\tgone\n"])
def test_what_cannot_be_a_record_is_refused(tmp_path: Path, line: str) -> None:
    record_path(tmp_path).write_text(line)
    with pytest.raises(UserError, match=r"broken\.txt is damaged: restore it"):
        read_broken(tmp_path)


def test_a_record_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    record_path(tmp_path).mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        append_broken(tmp_path, {"a.png": Broken(1, "gone")})


def test_the_record_of_an_earlier_version_tells_broken_images_from_lost_ones(tmp_path: Path) -> None:
    assert read_left_out(tmp_path) == {}
    lines = "3\t0\tcannot decode 3\ta.png\n12\t7\tnot in the data set any more\tb\\tc.png\n9\t8\ttorn"
    left_out_path(tmp_path).write_text(lines)
    assert read_left_out(tmp_path) == {3: "cannot decode 3", 12: None}
    left_out_path(tmp_path).write_text("-3\t0\tcannot decode 3\ta.png\n")
    with pytest.raises(UserError, match=r"left_out\.txt is damaged"):
        read_left_out(tmp_path)
