"""Broken JSON and YAML is one error in one line, at once, wherever it is read."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from instance_ssl.checkpoint.committed import MANIFEST, POSITION, _read_manifest
from instance_ssl.config.deepspeed import load_ds_config
from instance_ssl.config.experiment import load_config
from instance_ssl.data.named_sets import find_inaturalist2018
from instance_ssl.data.pack import RECORD, _is_done, _record_of, read_packed_set
from instance_ssl.errors import UserError
from instance_ssl.evaluation.cached_training import _read_figures
from instance_ssl.files.structured import MalformedError, parse_json, parse_yaml
from instance_ssl.report.command import main as report
from instance_ssl.run.directory import read_json, read_state
from instance_ssl.run.launch import read_hostfile
from instance_ssl.run.log import RunLog
from instance_ssl.run.manifest import _read
from instance_ssl.run.supervisor import _statuses
from settings import read_ablation
from table import _records

DEEP = 5000
BROKEN_JSON: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep but closed": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * DEEP,
    "empty": b"",
    "cut short": b"{",
    "a list": b"[]",
    "null": b"null",
    "no text": b'{"a": "\xff"}',
    "half a character": b'{"step": "\\ud800"}',
    "a zero character": b'{"step": "a\\u0000"}',
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "beyond 64 bits": b'{"step": ' + b"9" * 100 + b"}",
}
BROKEN_YAML: dict[str, str] = {
    "deep": "[" * DEEP,
    "deep below a key": "model: " + "[" * DEEP,
    "deep objects": "{a: " * DEEP,
    "deep blocks": "- " * DEEP,
    "deep lines": "a:\n" + "".join(" " * depth + "-\n" for depth in range(1000)),
    "itself": "model: &a [*a]",
    "a billion": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "twice": "seed: 1\nseed: 2",
    "twice below": "model: {backbone: small_cnn, backbone: resnet50}",
    "no such day": "seed: 2026-13-45",
    "half a character": 'data: {root: "\\ud800"}',
    "a zero character": 'data: {root: "a\\0b"}',
    "digits": "seed: " + "9" * 5000,
    "beyond 64 bits": "optimization: {epochs: " + "9" * 100 + "}",
    "code": "seed: !!python/object/apply:os.system [true]",
    "no date": "seed: !!timestamp x",
    "no bool": "seed: !!bool x",
    "a list": "[]",
}


@pytest.mark.parametrize("text", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_json_is_one_error(text: bytes) -> None:
    if text in (b"[]", b"null"):
        return  # sound, but no object: refused by the readers below
    with pytest.raises(MalformedError) as caught:
        parse_json(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_what_only_a_hand_writes_is_refused_where_hands_write() -> None:
    for text in ('{"a": 1, "a": 2}', '{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}'):
        parse_json(text)
        with pytest.raises(MalformedError):
            parse_json(text, by_hand=True)


@pytest.mark.parametrize("text", BROKEN_YAML.values(), ids=BROKEN_YAML)
def test_broken_yaml_is_a_user_s_mistake_at_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_config(path)
    with pytest.raises(UserError):
        read_ablation(path)
    if ":" not in text.split(" ")[0]:
        (tmp_path / "empty.yaml").write_text("")
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / "empty.yaml", [f"model.backbone={text}"])
    assert time.perf_counter() - began < 10  # the deep ones used to take minutes, or end in a traceback
    assert len(str(caught.value)) < 600


def test_anchors_and_merged_keys_are_yaml() -> None:
    assert parse_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}") == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}}


def ds_config(path: Path) -> None:
    load_ds_config(path, global_batch_size=1, max_grad_norm=0.0, world_size=1)


def position(path: Path) -> None:
    from instance_ssl.checkpoint.state import _read_position

    path.rename(path.with_name(POSITION))
    if isinstance(said := _read_position(path.parent), str):
        raise UserError(said)


def manifest(path: Path) -> None:
    path.rename(path.with_name(MANIFEST))
    if isinstance(said := _read_manifest(path.parent), str):
        raise UserError(said)


def which_is_which(path: Path) -> None:
    path.rename(path.with_name("data.json"))
    _read(path.parent)


def packed_set(path: Path) -> None:
    path.rename(path.with_name(RECORD))
    read_packed_set(path.parent)


def inaturalist(path: Path) -> None:
    path.rename(path.with_name("train2018.json"))
    find_inaturalist2018(path.parent, "train")


REFUSING = [ds_config, position, manifest, which_is_which, packed_set, inaturalist, read_hostfile]


@pytest.mark.parametrize("text", BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("read", REFUSING, ids=lambda read: read.__name__)
def test_readers_that_need_the_file_refuse_it(read: Callable[[Path], object], text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(text)
    with pytest.raises(UserError):
        read(path)


@pytest.mark.parametrize("text", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_readers_that_can_do_without_take_it_as_missing(text: bytes, tmp_path: Path) -> None:
    stage = tmp_path / "pretrain"
    stage.mkdir()
    for name in ("result.json", "status.json", "shard.tar.json"):
        (stage / name).write_bytes(text)
    (stage / "shard.tar").write_bytes(b"")
    assert read_json(stage / "result.json") in (None, {"a": None})
    assert read_state(stage, None) is None
    assert _statuses(tmp_path) == []
    assert _read_figures(stage / "result.json") is None
    assert _records(tmp_path, ["pretrain"]) == {}
    assert _record_of(stage / "shard.tar").exists()
    assert not _is_done(stage / "shard.tar")


@pytest.mark.parametrize("content", ["{}", '{"top1": "high"}', '{"top1": 1.0}', '{"diverged": 1}'])
def test_figures_of_a_training_that_say_nothing_count_as_missing(content: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(content)
    assert _read_figures(tmp_path / "f.json") is None


def test_broken_lines_of_metrics_are_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [b'{"step": 1, "train/loss": 2.0}', b'{"a": 1}', b"[]", b'{"step": "2"}', b'{"step": true}']
    lines += [*BROKEN_JSON.values(), b'{"step": 3, "train/loss": 1.0}', b'{"step": 9}', b'{"step": 4, "tr']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    log = RunLog(is_main=True)
    with log.metrics_in(tmp_path):
        log.forget_after(3)
        log.metrics(4, {"train/loss": 0.5})
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 3, 4]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.endswith(f"metrics.jsonl: {len(lines) - 3} broken lines dropped")


SIDE_FILES = ["config.yaml", "status.json", "result.json", "metrics.jsonl", "ds_config.json", "environment.json"]
STRANGE = [b'{"figures": [1], "state": {"a": 1}, "step": {}, "date": []}', b'{"figures": {"a": "b"}, "seconds": "x"}']


@pytest.mark.parametrize("text", [*BROKEN_JSON.values(), *STRANGE], ids=[*BROKEN_JSON, "strange", "stranger"])
def test_a_report_is_made_of_whatever_other_people_s_runs_hold(text: bytes, tmp_path: Path) -> None:
    for stage in ("initialize_classifier", "pretrain", "evaluate_knn", "evaluate_linear", "evaluate_similarity"):
        (tmp_path / stage).mkdir()
        for name in SIDE_FILES:
            (tmp_path / stage / name).write_bytes(text + b"\n" + text)
    (tmp_path / "data.json").write_bytes(text)
    assert report([str(tmp_path)]) == 0


def test_no_file_is_read_by_json_or_yaml_itself() -> None:
    """What is not read by `files.structured` has none of this."""
    root = Path(__file__).parents[3]
    readers = [
        path.name
        for folder in ("instance_ssl", "runners")
        for path in (root / folder).rglob("*.py")
        if any(call in path.read_text() for call in ("json.load", "yaml.safe_load", "yaml.load("))
    ]
    assert readers == ["structured.py"]
