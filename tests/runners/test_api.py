"""pretrain, embed and export: what the runners do, from Python."""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import instance_ssl
from instance_ssl import api
from instance_ssl.errors import UserError

NUM_IMAGES = 12
SMALL: dict[str, Any] = {
    "model.embedding_dim": 8,
    "data.image_size": 16,
    "optimization": {"epochs": 1, "warmup_epochs": 0, "global_batch_size": 6},
    "classifier.num_hard_classes": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 20, 20, 3), dtype=np.uint8)
    for number, values in enumerate(pixels):
        Image.fromarray(values).save(root / f"image {number:02d}.png")
    return root


def test_three_calls_train_embed_and_export(
    folder: Path, tmp_path: Path, forked_runners: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = instance_ssl.pretrain(folder, tmp_path / "run", backbone="small_cnn", **SMALL)
    assert "12 images" in capsys.readouterr().out
    features, names = instance_ssl.embed(run, folder)
    assert features.shape == (NUM_IMAGES, 128)
    assert features.dtype == np.float32
    assert names == sorted(path.name for path in folder.iterdir())
    assert np.unique(features, axis=0).shape == features.shape
    files = instance_ssl.export(run, ["pth", "safetensors"])
    assert {path.name for path in files.iterdir()} >= {"backbone.pth", "backbone.safetensors", "model_card.json"}
    again, _ = instance_ssl.embed(run, folder)
    assert np.array_equal(again, features)


def test_a_mistake_is_an_exception(folder: Path, tmp_path: Path, forked_runners: None) -> None:
    with pytest.raises(UserError, match=r"unknown key 'optimization\.epoch'; did you mean 'epochs'"):
        api.pretrain(folder, tmp_path / "run", **{"optimization.epoch": 3})
    with pytest.raises(UserError, match=r"data\.root .*nowhere"):
        api.pretrain(folder / "nowhere", tmp_path / "run")
    with pytest.raises(UserError, match="is not the directory of a run"):
        api.embed(tmp_path / "run", folder)


def _ends_with(lines: str, code: int) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.stderr.write({lines!r}); sys.exit({code})"]


@pytest.mark.parametrize(
    ("said", "code", "error"),
    [
        ("error: data.root x does not exist\n", 2, "UserError: data.root x does not exist"),
        ("", 75, "RunError: stopped; the same call resumes"),
        (
            "Traceback\nValueError: boo\n",
            1,
            "RunError: runners/x.py ended with exit code 1\nTraceback\nValueError: boo",
        ),
        ("rank 1 on host has died\n", 3, "RunError: runners/x.py ended with exit code 3\nrank 1 on host has died"),
    ],
)
def test_every_end_has_its_exception(monkeypatch: pytest.MonkeyPatch, said: str, code: int, error: str) -> None:
    wait = api._wait
    monkeypatch.setattr(api, "_wait", lambda command, errors: wait(_ends_with(said, code), errors))
    with pytest.raises((UserError, api.RunError)) as caught:
        api._run("x", [])
    assert f"{type(caught.value).__name__}: {caught.value}" == error


def test_an_interrupt_lets_the_run_save_and_stop(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    pathlib.Path('saved').write_text('yes')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{script}"]
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        api._wait(command, None)
    interrupter.join()
    assert (tmp_path / "saved").read_text() == "yes"


@pytest.mark.full
def test_two_ranks_in_processes_of_their_own(folder: Path, tmp_path: Path) -> None:
    run = api.pretrain(folder, tmp_path / "run", backbone="small_cnn", ranks=2, **SMALL)
    features, names = api.embed(run, folder)
    assert (len(features), len(names)) == (NUM_IMAGES, NUM_IMAGES)
    with pytest.raises(UserError, match="holds a run with seed = 0, not 1"):
        api.pretrain(folder, run, backbone="small_cnn", ranks=2, seed=1, **SMALL)
