"""A file of tensors replaces the one before it whole or not at all, and says in one line why it could not."""

from pathlib import Path

import pytest
import torch

from instance_ssl.checkpoint import directory
from instance_ssl.checkpoint.directory import read_tensors, replace_file
from instance_ssl.errors import UserError


def test_a_new_state_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for value in (1.0, 2.0):
        replace_file(path, {"a": torch.tensor([value])})
        assert read_tensors(path)["a"].item() == value
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_that_cannot_be_written_is_the_users_error_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    replace_file(path, {"a": torch.ones(1)})
    with pytest.raises(UserError, match=r"absent/state\.pt could not be written: No such file"):
        replace_file(tmp_path / "absent/state.pt", {"a": torch.ones(1)})
    monkeypatch.setattr(directory, "content_bytes", lambda content: 2**60)
    with pytest.raises(UserError, match=r"state\.pt could not be written: no space left.* needed"):
        replace_file(path, {"a": torch.zeros(1)})
    assert read_tensors(path)["a"].item() == 1
    assert list(tmp_path.iterdir()) == [path]
