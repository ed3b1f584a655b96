"""Files are written whole or not at all: after errors, kills, among several writers; synced before they appear."""

import errno
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from instance_ssl.errors import UserError
from instance_ssl.files import atomic
from instance_ssl.files.atomic import saved_file, sync_directory, whole_file, write_json, write_lines, write_text


def test_what_is_written_replaces_what_was_there_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    write_text(path, "né\n")
    assert path.read_bytes() == "né\n".encode()
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    write_lines(iter(["a", "b\udcff"]), path)
    assert path.read_bytes() == b"a\nb\xff\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _killed_in_the_middle(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_the_old_content_and_the_next_write_takes_its_leftover_away(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    killed = multiprocessing.get_context("fork").Process(target=_killed_in_the_middle, args=(path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_it_is_renamed_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        calls.append(f"to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_text(tmp_path / "a.txt", "x")
    assert calls == [".a.txt.tmp", "to a.txt", tmp_path.name]


def test_several_writers_do_not_write_into_each_others_file(tmp_path: Path) -> None:
    path, both = tmp_path / "a.txt", threading.Barrier(2)

    def write(text: str) -> None:
        with whole_file(path, several_writers=True) as temporary:
            both.wait()
            temporary.write_text(text)
            both.wait()

    writers = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [path]


def save(path: Path, needed: int) -> None:
    with saved_file(path, needed) as temporary:
        temporary.write_bytes(b"x")
        raise AssertionError("the disk has no room for it")


def test_a_disk_without_room_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.bin could not be written: no space left.*needed"):
        save(tmp_path / "a.bin", needed=2**60)
    with pytest.raises(UserError, match=r"absent/a\.bin could not be written: No such file"):
        save(tmp_path / "absent/a.bin", needed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_directories_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "_sync", fail)
    if passes:
        sync_directory(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output"):
            sync_directory(tmp_path)
