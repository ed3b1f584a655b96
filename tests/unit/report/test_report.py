"""The page of runs: whole runs, unfinished runs, broken files; and a real browser's view."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from instance_ssl.checkpoint.directory import write_file
from instance_ssl.config.experiment import load_config
from instance_ssl.data.image_sources import write_instances
from instance_ssl.evaluation.embedding_map import principal_components
from instance_ssl.report.command import main
from instance_ssl.report.page import build_page, curve, knn_curve
from instance_ssl.report.pictures import Line, line_chart, png_file
from instance_ssl.report.runs import open_runs
from instance_ssl.run.images import open_split

ROOT = Path(__file__).parents[3]
N, K = 60, 6


def _write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps({"time": 0, **line}) + "\n" for line in lines))


def _training(run: Path, *, epochs_done: int, state: str, seed: int = 0) -> None:
    """What the first two stages leave, of a training of 4 epochs and 6 steps each."""
    stage = run / "pretrain"
    stage.mkdir(parents=True)
    overrides = [f"data.limit_train={N}", "optimization.global_batch_size=10", f"seed={seed}", "optimization.epochs=4"]
    overrides += ["optimization.warmup_epochs=1"]
    config = load_config(ROOT / "runners/configs/pipeline_digits.yaml", overrides)
    (stage / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    _write(run / "data.json", {"num_instances": N, "digest": "x"})
    write_instances(open_split(config.data, "train"), run / "instances.txt")
    _write(stage / "status.json", {"state": state, "date": "2026-11-24T10:00:00", "reason": None})
    lines = [
        {"step": step, "train/loss": 4 - 0.1 * step, "train/instance_accuracy": 0.01 * step, "train/learning_rate": 0.1}
        for step in range(3, 6 * epochs_done + 1, 3)
    ]
    _lines(stage / "metrics.jsonl", lines)
    if epochs_done:
        checkpoint = stage / f"checkpoints/step_{6 * epochs_done:09d}"
        checkpoint.mkdir(parents=True)
        hard = torch.stack([torch.arange(1, K + 1).add(i) % N for i in range(N)]).int()
        for first, last in ((0, 31), (31, N)):
            content = {"weight": torch.ones(last - first, 4), "momentum": None, "hard_classes": hard[first:last]}
            write_file(checkpoint / f"rows_{first:09d}_{last:09d}.pt", content)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run with every stage, and one more that the page has never heard of."""
    run = tmp_path / "whole"
    _training(run, epochs_done=4, state="complete")
    around = {"date": "2026-11-24T10:00:00+00:00", "commit": "abc", "world_size": 2, "seconds": 1.5, "versions": {}}
    _write(
        run / "pretrain/result.json",
        {"stage": "pretrain", "epochs": 4, "loss": 1.6, "instance_accuracy": 0.24, **around},
    )
    grid = [{"k": k, "temperature": 0.1, "top1": 90.0 + k, "top5": 99.0} for k in (1, 2)]
    knn = {"pixels": {**grid[0], "grid": grid, "layer": "pixels"}, "trained": {**grid[1], "grid": grid, "epoch": 4}}
    _write(run / "evaluate_knn/result.json", {"figures": knn, "picture": "evaluate_knn/neighbours.png", **around})
    _lines(run / "evaluate_knn/metrics.jsonl", [{"step": 4, "knn/trained_top1": 92.0}])
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    sample = {"ids": torch.arange(40), "components": principal_components(features, 5)}
    labels = torch.arange(40) % 3
    names = ["a <b>", "b&c", "d"]
    write_file(run / "evaluate_knn/map.pt", {"sources": {"trained": sample}, "labels": labels, "class_names": names})
    modes = {"gaussian": 0.0, "running": 0.5}
    keys = ("intra_class", "inter_class", "class_gap", "intra_view", "inter_view", "view_gap")
    similarity = {mode: {key: value for key in keys} for mode, value in modes.items()}
    picture = {"picture": "evaluate_similarity/similarity.png"}
    _write(run / "evaluate_similarity/result.json", {"figures": similarity, **picture, **around})
    Image.new("RGB", (40, 20)).save(run / picture["picture"])
    points = [{"epoch": e, "instance_accuracy": 5.0 * e, "knn_top1": 80.0 + e} for e in (1, 2, 3)]
    correlation = {"pearson": 0.98765, "spearman": 1.0}
    picture = {"picture": "evaluate_checkpoints/correlation.png"}
    _write(
        run / "evaluate_checkpoints/result.json", {"figures": points, "correlation": correlation, **picture, **around}
    )
    Image.new("RGB", (40, 20)).save(run / picture["picture"])
    _write(run / "evaluate_novelty/result.json", {"figures": {"boxes": {"AP": 12.3456}}, "iterations": 24000, **around})
    return run


class _Sound(HTMLParser):
    """Checks that tags are closed in order, and gathers what the page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        self.tags.add(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def _page(*runs: Path) -> _Sound:
    page = _Sound(build_page(open_runs(runs)))
    assert page.open == []
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    return page


def test_a_whole_run_shows_everything(whole: Path) -> None:
    text = _page(whole).text
    sections = ("Curves", "Results", "The paper's figures 1(b) and 4", "Test images in the plane", "Hardest classes")
    for words in (*sections, "Recipe", "0.9877", "24.00 %", "92.00 %"):
        assert words in text, words
    assert "12.35" in text  # of a stage that the page has never heard of
    assert "24,000" in text
    assert "grid (4 rows)" in text
    assert "a <b>" in text  # a class name, escaped in the page's source
    (run,) = open_runs([whole])
    assert curve(run, "train/loss")[0] == (0.5, pytest.approx(3.7))  # (step 3) / (6 steps an epoch)
    assert knn_curve(run) == [(4, 92.0)]


def test_the_stages_pictures_of_the_papers_figures_are_shown(whole: Path) -> None:
    html = build_page(open_runs([whole]))
    assert re.findall(r'alt="(Figure [^"]*)"', html) == ["Figure 1(b) of whole", "Figure 4 of whole"]
    (whole / "evaluate_similarity/similarity.png").unlink()
    assert re.findall(r'alt="(Figure [^"]*)"', build_page(open_runs([whole]))) == ["Figure 1(b) of whole"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "data.json", "absent.png", "a\0b", 3, None])
def test_only_a_png_of_the_run_itself_is_shown(name: object, whole: Path) -> None:
    Image.new("RGB", (4, 4)).save(whole.parent / "secret.png")
    assert png_file(whole, name) is None


def test_hostile_names_are_text(whole: Path, tmp_path: Path) -> None:
    hostile = '_<script>alert(1)|script> $\\frac{ & "b" {{ runs }} {% raw %}'
    run = whole.rename(tmp_path / hostile)
    figures = {hostile: {"top1": 1.0, hostile: 2.0}, "pixels": {"top1": 3.0}, "random": {"top1": 4.0}}
    _write(run / "evaluate_knn/result.json", {"figures": figures, hostile: hostile, "picture": hostile})
    _write(run / "pretrain/status.json", {"state": hostile, "reason": hostile})
    _training(tmp_path / "second", epochs_done=1, state="failed")
    for runs in ([run], [run, tmp_path / "second"]):
        page = _page(*runs)
        assert page.text.count(hostile) > 5
        assert "script" not in page.tags


def test_hardest_classes_are_those_of_the_checkpoint(whole: Path) -> None:
    html = build_page(open_runs([whole]))
    gallery = html[html.index('class="gallery"') : html.index("hardest first")]
    names = re.findall(r'alt="digits/train/\d+ \((\d)\)"', gallery)
    rows = gallery.count('class="row"')
    assert rows == 10
    assert len(names) == rows * (1 + K)
    last = gallery.split('class="row"')[-1]  # image 59, whose hardest are 0 … 5
    shown = re.findall(r'class="(query|same|other)" src="[^"]*" alt="digits/train/\d+ \((\d)\)"', last)
    assert [kind for kind, _ in shown[1:]] == ["same" if label == shown[0][1] else "other" for _, label in shown[1:]]
    assert len(shown) == 1 + K


def test_images_are_found_by_their_names(whole: Path) -> None:
    names = (whole / "instances.txt").read_text().splitlines()
    (whole / "instances.txt").write_text("".join(f"{name}\n" for name in reversed(names)))
    html = build_page(open_runs([whole]))
    queries = re.findall(r'class="query" src="[^"]*" alt="(\S+) ', html)
    assert queries[0] == names[-1]  # image 0, whatever its place in the list is now
    assert queries[-1] == names[0]
    (whole / "instances.txt").write_text("".join(f"{name} was\n" for name in names))
    assert f"data.root: {names[0]} was is gone" in _page(whole).text


def test_several_runs_stand_side_by_side(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/whole"
    _training(other, epochs_done=2, state="running", seed=7)
    with (other / "pretrain/metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "train/lo')  # half a line, as of a run that is writing
    text = _page(whole, other).text
    assert "while other/whole was still running" in text
    assert "Where the runs differ" in text
    assert "epochs done" in text
    differing = text[text.index("Where the runs differ") : text.index("Other than the defaults")]
    assert "seed" in differing
    assert "data.kind" not in differing


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    _training(tmp_path / "run", epochs_done=0, state="running")
    text = _page(tmp_path / "run").text
    assert "the training has written no checkpoint yet" in text
    assert "Test images in the plane" not in text


def test_damaged_files_are_said_and_the_rest_is_shown(whole: Path) -> None:
    (whole / "evaluate_knn/map.pt").write_bytes(b"nothing")
    (whole / "evaluate_linear").mkdir()
    (whole / "evaluate_linear/result.json").write_text('{"figures":')
    for path in whole.glob("pretrain/checkpoints/*/rows_*.pt"):
        path.write_bytes(b"nothing")
    text = _page(whole).text
    assert text.count("cannot be") >= 2
    assert "Recipe" in text


def test_values_that_no_axis_spans_are_skipped(tmp_path: Path) -> None:
    _training(tmp_path / "run", epochs_done=1, state="failed")
    values = ["NaN", "Infinity", "1e300", "1" + "0" * 400, "true", '"x"', "null"]
    with (tmp_path / "run/pretrain/metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}, "train/loss": {value}}}\n' for step, value in enumerate(values, 100))
        file.write(f'{{"step": 1{"0" * 400}, "train/loss": 1.0}}\n')
    (run,) = open_runs([tmp_path / "run"])
    assert [step for step, _ in run.stages["pretrain"].series("train/loss")] == [3, 6]
    assert "Curves" in _page(tmp_path / "run").text


def test_a_long_curve_keeps_its_ends_and_few_points() -> None:
    points = [(float(step), step / 7) for step in range(5000)]
    path = max(re.findall(r' d="([^"]*)"', line_chart([Line(0, points)], {}, "y")), key=len)
    assert len(path.split("L")) <= 300


def test_every_run_has_the_colour_of_its_legend(whole: Path) -> None:
    chart = line_chart([Line(0, [(0, 1), (1, 2)]), Line(9, [(0, 2), (1, 1)])], {"pixels": 1.5}, "y")
    assert "var(--run0)" in chart
    assert "var(--run1)" in chart  # the ninth run after the first has the second colour
    assert "#0000" not in chart
    assert "pixels 1.5" in chart


@pytest.mark.parametrize("words", [["{d}/absent"], ["{d}/empty"], ["{d}/whole", "--output", "{d}/whole/data.json/x"]])
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([word.format(d=tmp_path) for word in words]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def _browser() -> Any:
    """Playwright and the path of a Chromium; skips where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser on the PATH (looked for {', '.join(names)})")
    return playwright, path


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.full),
        pytest.param(390, "light", marks=pytest.mark.full),
    ],
)
def test_a_browser_shows_the_page_without_complaint(whole: Path, scheme: str, width: int) -> None:
    playwright, path = _browser()
    assert main([str(whole)]) == 0
    complaints: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"request {request.url[:80]}"))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto((whole / "report.html").as_uri())
        broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        images = page.evaluate("document.images.length")
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        heights = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert complaints == []
    assert images > 50
    assert broken == 0
    assert overflow <= 0  # wide tables scroll inside the page
    assert len(heights) == 5  # four curves and a map
    assert min(heights) > 100
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert (int(re.findall(r"\d+", background)[0]) > 128) == (scheme == "light")


@pytest.mark.parametrize("kind", ["tree", "folder"])
def test_of_folders_only_the_shown_files_are_opened(kind: str, tmp_path: Path) -> None:
    run, root = tmp_path / "run", tmp_path / "images"
    _training(run, epochs_done=1, state="complete")
    config = yaml.safe_load((run / "pretrain/config.yaml").read_text())
    config["data"] |= {"kind": kind, "root": str(root)}
    (run / "pretrain/config.yaml").write_text(yaml.safe_dump(config))
    names = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(N)]
    (run / "instances.txt").write_text("".join(f"{name}\n" for name in names))
    html = build_page(open_runs([run]))
    assert str(root) in html  # one line says which file is not there
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20 + i % 3), (i, 0, 0)).save(root / name)
    (root / "train/a/broken.png").write_bytes(b"none of the run's images")
    html = build_page(open_runs([run]))
    kinds = re.findall(r'class="(same|other)" src="data', html)
    assert len(kinds) == (10 * K if kind == "tree" else 0)
    assert html.count('title="train/') == 10 * (1 + K)
    if kind == "tree":  # the hardest of image i are i + 1 … i + 6
        assert kinds[:K] == ["other", "same"] * (K // 2)
