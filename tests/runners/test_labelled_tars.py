"""A labelled set of two images in tar shards is evaluated like any other."""

import json
from pathlib import Path

from image_files import encoded, write_tar
from processes import run_bare


def test_two_images_with_labels_far_apart_are_two_classes(tmp_path: Path) -> None:
    members = [("a.png", encoded(0, ".png", 16)), ("a.cls", b"0")]
    members += [("b.cls", b"20000000"), ("b.png", encoded(1, ".png", 16))]
    for split in ("train", "val"):
        write_tar(tmp_path / f"data/{split}-0.tar", members)
    settings = [f"data.root={tmp_path}/data", "data.kind=tar", "data.image_size=16", "data.num_workers=0"]
    settings += ["evaluation.sources=[pixels]", "evaluation.knn.neighbours=[1]", "evaluation.knn.temperatures=[0.1]"]
    finished = run_bare("evaluate_knn", "--run-dir", str(tmp_path / "run"), "--set", *settings)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "run/evaluate_knn/result.json").read_text())
    assert result["figures"]["pixels"]["top1"] == 100
