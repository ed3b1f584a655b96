"""Lists of labelled images: SimCLR's form, a balanced and reproducible draw, and one-line errors."""

from pathlib import Path

import pytest
import torch

from instance_ssl.errors import UserError
from instance_ssl.evaluation.label_lists import draw_balanced, read_label_list, write_label_list

NAMES = [f"train/n0{c}/n0{c}_{i}.JPEG" for c in range(3) for i in range(4)]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text)
    return path


def test_file_names_and_whole_names_are_found_whatever_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, "n02_3.JPEG\n\ntrain/n00/n00_1.JPEG\r\nn01_0.JPEG\n")
    assert read_label_list(path, NAMES).tolist() == [1, 4, 11]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n00_0.JPEG\nn09_9.JPEG\nn09_8.JPEG\n", "2 of 3 images that are not among the 12 training images"),
        ("n00_0.JPEG\nn00_0.JPEG\n", "twice, the first 'n00_0.JPEG'"),
        ("n00_0.JPEG\ntrain/n00/n00_0.JPEG\n", "twice"),
        ("\n", "names no image"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        read_label_list(written(tmp_path, text), NAMES)
    assert "list.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_name_in_two_folders_is_unclear_and_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"several folders hold a '0\.png'"):
        read_label_list(written(tmp_path, "0.png\n"), ["a/0.png", "b/0.png"])
    with pytest.raises(UserError, match=r"absent\.txt cannot be read: No such file"):
        read_label_list(tmp_path / "absent.txt", NAMES)


@pytest.mark.parametrize("names", [NAMES, [f"{i % 2}/{i // 2}.png" for i in range(12)]])
def test_what_is_written_is_read_again(tmp_path: Path, names: list[str]) -> None:
    ids = torch.tensor([0, 3, 7])
    write_label_list(tmp_path / "list.txt", names, ids)
    assert read_label_list(tmp_path / "list.txt", names).tolist() == [0, 3, 7]


def test_a_draw_is_balanced_and_the_seeds_alone() -> None:
    labels = torch.arange(1000) % 7
    ids = draw_balanced(labels, 100, seed=3)
    assert ids.tolist() == sorted(set(ids.tolist()))
    sizes = labels[ids].bincount(minlength=7)
    assert int(sizes.sum()) == 100
    assert int(sizes.max() - sizes.min()) == 1
    assert draw_balanced(labels, 100, seed=3).tolist() == ids.tolist()
    assert draw_balanced(labels, 100, seed=4).tolist() != ids.tolist()


def test_a_small_class_gives_all_it_has() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] * 50)
    assert labels[draw_balanced(labels, 22, seed=0)].bincount().tolist() == [10, 2, 10]
    assert len(draw_balanced(labels, 102, seed=0)) == 102
