"""Images that cannot be read end the run with one line; none is skipped, and none stands in for another (F25)."""

import os
import shutil
from pathlib import Path

import pytest
from image_files import png_that_claims
from PIL import Image
from rig import checkpoints, digests, quick_first, run, running, status, wait_for

FOUND_AT_ONCE = {
    "empty": b"",
    "text": b"this is no image\n" * 20,
    "no pixels": png_that_claims(0, 0),
    "bomb": png_that_claims(60_000, 60_000),
    "gif": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
}


@pytest.fixture
def images(initialised: Path, place: Path) -> Path:
    """Images of the test's own, in place of the shared ones."""
    (place / "images").unlink()
    return Path(shutil.copytree(initialised / "images", place / "images"))


@pytest.mark.parametrize("kind", quick_first([*FOUND_AT_ONCE], lambda kind: kind == next(iter(FOUND_AT_ONCE))))
def test_a_file_that_is_no_image_is_refused_at_the_start(place: Path, images: Path, kind: str) -> None:
    shutil.rmtree(place / "run")
    (images / "007.png").write_bytes(FOUND_AT_ONCE[kind])
    refused = run(place, stage="initialize_classifier")
    assert refused.wait() == [2, 2], refused.text()
    assert refused.text().count("error: ") == 1
    assert "007.png" in refused.text()
    assert "Traceback" not in refused.text()
    assert not (place / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read_is_refused_at_the_start(place: Path, images: Path) -> None:
    (images / "007.png").chmod(0)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "007.png" in refused.text()


def test_a_file_with_a_good_header_alone_ends_the_run_when_it_is_met(place: Path, images: Path) -> None:
    shutil.rmtree(place / "run")
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "007.png")
    (images / "007.png").write_bytes((images / "007.png").read_bytes()[:2000])
    ended = run(place, stage="initialize_classifier")
    assert sorted(ended.wait()) == [2, 3], ended.text()
    assert ended.text().count("error: ") == 1
    assert "007.png" in ended.text()
    assert "Traceback" not in ended.text()
    assert "007.png" in status(place, "initialize_classifier")["reason"]  # not merely that a rank has gone


@pytest.mark.parametrize("workers", quick_first([0, 2], lambda workers: workers == 2, lambda workers: True))
def test_a_run_goes_on_once_a_file_that_vanished_is_back(
    place: Path, images: Path, clean: dict[str, str], workers: int
) -> None:
    settings = {"data.num_workers": workers}
    with running(place, fault="step:*:*:sleep=0.1", settings=settings) as ended:
        wait_for(lambda: checkpoints(place))
        for number in range(8):  # some of them are met before the end
            (images / f"{number:03d}.png").rename(place / f"{number:03d}.png")
        codes = ended.wait()
    assert 2 in codes, ended.text()
    assert set(codes) <= {2, 3}, ended.text()
    assert "cannot decode" in ended.text()
    assert "cannot decode" in status(place)["reason"]
    assert "Traceback" not in ended.text()
    for number in range(8):
        (place / f"{number:03d}.png").rename(images / f"{number:03d}.png")
    resumed = run(place, settings=settings)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean
