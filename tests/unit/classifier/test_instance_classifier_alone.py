"""`InstanceClassifier` in one process without a process group: scaled losses, precision, files, and mistakes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ROOT, cpu_environment
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import instance_ssl
from instance_ssl import InstanceClassifier
from instance_ssl.distributed import comm
from instance_ssl.errors import UserError

N, D, K = 40, 8, 5
IDS = torch.tensor([3, 17, 39, 0, 17])


def new_classifier(**settings: Any) -> InstanceClassifier:
    classifier = InstanceClassifier(N, D, **{"num_hard_classes": K, "seed": 1} | settings)
    classifier.refresh_hard_classes()
    return classifier


def embeddings(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(len(IDS), D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def rows_after(step: Callable[[InstanceClassifier, Tensor], object], **settings: Any) -> tuple[Tensor, Tensor]:
    """Rows after a loop's step, and the gradient that the embeddings had."""
    classifier, x_bD = new_classifier(**settings), embeddings()
    step(classifier, x_bD)
    assert x_bD.grad is not None
    return classifier.state_dict()["weight"], x_bD.grad


def plain_step(classifier: InstanceClassifier, x_bD: Tensor) -> None:
    classifier(x_bD, IDS).backward()
    classifier.step(0.1)


def test_it_needs_no_process_group_and_starts_none() -> None:
    rows_after(plain_step)
    assert not dist.is_initialized()


def test_a_world_that_starts_after_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = new_classifier()
    monkeypatch.setattr(comm, "default_world_size", lambda: 2)
    for call in (lambda: classifier(embeddings(), IDS), classifier.refresh_hard_classes):
        with pytest.raises(RuntimeError, match="started after this classifier was made"):
            call()


def test_one_of_several_launched_processes_has_to_join_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2 and no process group.*init_process_group"):
        InstanceClassifier(N, D, num_hard_classes=K)


def test_a_module_does_not_see_its_rows() -> None:
    module = nn.Linear(2, 2)
    module.classifier = new_classifier()
    assert module.state_dict().keys() == {"weight", "bias"}
    assert len(list(module.parameters())) == 2
    assert not list(module.buffers())


@pytest.mark.parametrize("loss_form", ["mixture", "cross_entropy"])
def test_a_factor_on_the_loss_acts_on_rows_and_embeddings(loss_form: str) -> None:
    """Twice the loss with λ = 0 moves the rows twice as far."""

    def double_step(classifier: InstanceClassifier, x_bD: Tensor) -> None:
        (2 * classifier(x_bD, IDS)).backward()
        classifier.step(0.1)

    settings = {"loss_form": loss_form, "weight_decay": 0.0, "row_dtype": torch.float64}
    first = new_classifier(**settings).state_dict()["weight"]
    (once, gradient), (twice, double_gradient) = rows_after(plain_step, **settings), rows_after(double_step, **settings)
    assert (once - first).abs().max() > 1e-3
    torch.testing.assert_close(twice - first, 2 * (once - first), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(double_gradient, 2 * gradient)


def test_a_second_backward_pass_adds_its_gradient() -> None:
    def step_of_two(classifier: InstanceClassifier, x_bD: Tensor) -> None:
        loss = classifier(x_bD, IDS)
        loss.backward(retain_graph=True)
        (3 * loss).backward()
        classifier.step(0.1)

    def step_of_one(classifier: InstanceClassifier, x_bD: Tensor) -> None:
        (4 * classifier(x_bD, IDS)).backward()
        classifier.step(0.1)

    for two, one in zip(rows_after(step_of_two), rows_after(step_of_one), strict=True):
        torch.testing.assert_close(two, one)


def test_a_loss_without_a_backward_pass_leaves_no_trace() -> None:
    def step(classifier: InstanceClassifier, x_bD: Tensor) -> None:
        classifier(embeddings().flip(1), IDS)
        plain_step(classifier, x_bD)

    for with_it, without in zip(rows_after(step), rows_after(plain_step), strict=True):
        assert torch.equal(with_it, without)


def test_a_loss_scaler_acts_on_the_embeddings_alone() -> None:
    def scaled_step(classifier: InstanceClassifier, x_bD: Tensor) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD([x_bD], lr=0.0)
        scaler.scale(classifier(x_bD, IDS)).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        classifier.step(0.1, loss_scale=scale)

    for scaled, plain in zip(rows_after(scaled_step), rows_after(plain_step), strict=True):
        torch.testing.assert_close(scaled, plain)


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    classifier, x_bD, half_bD = new_classifier(), embeddings(), embeddings(torch.float16)
    # The mean over so many rows has gradients below float16's smallest number.
    (classifier(x_bD, IDS, total_rows=10**9) * 2.0**26).backward()
    (classifier(half_bD, IDS, total_rows=10**9) * 2.0**26).backward()
    assert x_bD.grad is not None
    assert half_bD.grad is not None
    assert half_bD.grad.dtype == torch.float16
    torch.testing.assert_close(half_bD.grad.float(), x_bD.grad, rtol=1e-2, atol=1e-4)


def test_autocast_changes_no_bit() -> None:
    def autocast_step(classifier: InstanceClassifier, x_bD: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            classifier.refresh_hard_classes()
            plain_step(classifier, x_bD)

    for inside, outside in zip(rows_after(autocast_step), rows_after(plain_step), strict=True):
        assert torch.equal(inside, outside)


def test_rows_train_on_embeddings_without_gradient() -> None:
    classifier, twin = new_classifier(), new_classifier()
    for one, x_bD in ((classifier, embeddings().detach()), (twin, embeddings())):
        plain_step(one, x_bD)
    assert torch.equal(classifier.state_dict()["weight"], twin.state_dict()["weight"])


def test_discard_changes_no_row() -> None:
    classifier = new_classifier()
    before = classifier.state_dict()["weight"]
    classifier(embeddings(), IDS).backward()
    classifier.discard()
    assert torch.equal(classifier.state_dict()["weight"], before)
    with pytest.raises(RuntimeError, match="there was no loss"):
        classifier.step(0.1)


def test_without_gradient_there_is_nothing_to_step_by() -> None:
    classifier = new_classifier()
    with torch.no_grad():
        value = classifier(embeddings(), IDS)
    assert value == classifier(embeddings(), IDS).detach()
    assert not value.requires_grad


def test_a_file_has_the_settings_and_gives_the_same_bits(tmp_path: Path) -> None:
    path, classifier = tmp_path / "classifier.safetensors", new_classifier()
    plain_step(classifier, embeddings())
    classifier.save(path)
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
    assert (settings["num_instances"], settings["temperature"]) == (N, 0.15)
    other = new_classifier(seed=2)
    other.load(path)
    for name, value in classifier.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.safetensors"]
    shorter = InstanceClassifier(N, D, num_hard_classes=K - 1)
    shorter.load(path)
    with pytest.raises(RuntimeError, match="call refresh_hard_classes"):
        shorter(embeddings(), IDS)


def write_foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(N, D)}, path)


def write_without_rows(path: Path) -> None:
    settings = {"num_instances": N, "embedding_dim": D, "temperature": 0.15, "loss_form": "mixture"}
    metadata = {"kind": "instance_ssl.InstanceClassifier", "settings": json.dumps(settings)}
    save_file({"weight": torch.zeros(N, D)}, path, metadata)


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (lambda path: None, "cannot be read: .*[Nn]o such file"),
        (lambda path: path.write_bytes(b"\x07\0\0\0\0\0\0\0{broken"), "cannot be read"),
        (write_foreign, "is not the file of an InstanceClassifier"),
        (write_without_rows, "has no momentum"),
        (lambda path: new_classifier(temperature=0.2).save(path), "has temperature 0.2, .* has 0.15"),
        (lambda path: InstanceClassifier(N + 1, D, num_hard_classes=K).save(path), "has num_instances 41.* has 40"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(write: Callable[[Path], object], wanted: str, tmp_path: Path) -> None:
    path, classifier = tmp_path / "a\nb.safetensors", new_classifier()
    write(path)
    before = classifier.state_dict()
    with pytest.raises(ValueError, match=wanted) as caught:
        classifier.load(path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(classifier.state_dict()[name], value) for name, value in before.items())


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written: No such file"):
        new_classifier().save(tmp_path / "absent/classifier.safetensors")


def test_without_safetensors_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (new_classifier().save, new_classifier().load):
        with pytest.raises(ImportError, match=r"pip install -e \"\.\[export\]\""):
            call(tmp_path / "classifier.safetensors")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"num_instances": 1}, "num_instances is 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"temperature": 0.01}, "temperature is 0.01: at least 0.03"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"num_hard_classes": N}, "num_hard_classes is 40, of 39 other classes"),
        ({"smoothing_factor": 1.0}, "smoothing_factor is 1"),
        ({"loss_form": "softmax"}, "loss_form is 'softmax'"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"sampling": "some"}, "sampling is 'some'"),
        ({"sampling": "random"}, "sampling random cannot be combined with smoothing"),
        ({"num_sampled_classes": 0}, "num_sampled_classes is 0"),
        ({"gradient_reduction": "average"}, "gradient_reduction is 'average': mean"),
        ({"row_dtype": torch.float16}, "row_dtype is torch.float16"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        InstanceClassifier(**{"num_instances": N, "embedding_dim": D, "num_hard_classes": K} | settings)


@pytest.mark.parametrize(
    ("x_bD", "ids", "wanted"),
    [
        (embeddings(), IDS + 23, "there is a 62"),
        (embeddings(), IDS - 1, "there is a -1"),
        (embeddings(), IDS.int(), "an int64 tensor .* not torch.int32"),
        (embeddings(), IDS[:3], r"ids are \(5,\), one a row, not \(3,\)"),
        (embeddings(), IDS.tolist(), "not list"),
        (embeddings()[:, :4], IDS, r"embeddings are \(b, 8\), not \(5, 4\)"),
        (embeddings()[0], IDS, r"embeddings are \(b, 8\), not \(8,\)"),
        (embeddings().long(), IDS, "a float tensor"),
        (embeddings().to("meta"), IDS, "embeddings are on meta, and the classifier is on cpu"),
        (embeddings()[:0], IDS[:0], "no rank has any rows"),
    ],
)
def test_a_wrong_batch_is_one_line(x_bD: Tensor, ids: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        new_classifier()(x_bD, ids)


def backward(classifier: InstanceClassifier, factor: float = 1.0, x_bD: Tensor | None = None) -> None:
    (classifier(embeddings() if x_bD is None else x_bD, IDS) * factor).backward()


def test_calls_in_a_wrong_order_are_one_line() -> None:
    classifier = new_classifier()
    with pytest.raises(RuntimeError, match="there was no loss since the last step"):
        classifier.step(0.1)
    loss = classifier(embeddings(), IDS)
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\) was not called since the last step"):
        classifier.step(0.1)
    plain_step(classifier, embeddings())
    with pytest.raises(RuntimeError, match="there was no loss since the last step"):
        classifier.step(0.1)
    with pytest.raises(RuntimeError, match=r"of a loss from before the last step\(\)"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"initialize\(\) comes before the first step"):
        classifier.initialize(nn.Linear(2, D), [])
    unready = InstanceClassifier(N, D, num_hard_classes=K)
    with pytest.raises(RuntimeError, match=r"needs hard classes: call refresh_hard_classes\(\)"):
        unready(embeddings(), IDS)
    with pytest.raises(ValueError, match="total_rows is 4, and this loss alone has 5"):
        classifier(embeddings(), IDS, total_rows=4)


@pytest.mark.parametrize(
    ("work", "rate", "loss_scale", "wanted"),
    [
        (backward, float("nan"), 1.0, "the learning rate is nan"),
        (backward, -0.1, 1.0, "the learning rate is -0.1"),
        (backward, 0.1, 0.0, "loss_scale is 0"),
        (lambda one: backward(one, -1.0), 0.1, 1.0, "the loss was multiplied by -1"),
        (lambda one: backward(one, float("inf")), 0.1, 1.0, r"not finite: call discard\(\)"),
        (lambda one: backward(one, x_bD=embeddings() * torch.nan), 0.1, 1.0, r"not finite: call discard\(\)"),
    ],
)
def test_a_step_that_would_ruin_the_rows_is_refused(
    work: Callable[[InstanceClassifier], object], rate: float, loss_scale: float, wanted: str
) -> None:
    classifier = new_classifier()
    before = classifier.state_dict()["weight"]
    work(classifier)
    with pytest.raises((ValueError, RuntimeError), match=wanted):
        classifier.step(rate, loss_scale=loss_scale)
    assert torch.equal(classifier.state_dict()["weight"], before)


def test_sampled_classes_are_drawn_for_a_whole_step() -> None:
    classifier = InstanceClassifier(N, D, smoothing_factor=0.0, sampling="random", num_sampled_classes=6)
    backward(classifier)
    with pytest.raises(RuntimeError, match=r"an id is not among the classes drawn.*begin_step\(ids\)"):
        classifier(embeddings(), IDS + torch.tensor([0, 0, 0, 1, 0]))
    with pytest.raises(RuntimeError, match=r"begin_step\(\) comes once a step"):
        classifier.begin_step(IDS)
    classifier.step(0.1)
    classifier.begin_step(torch.cat([IDS, torch.tensor([1])]))
    classifier(embeddings(), IDS + torch.tensor([0, 0, 0, 1, 0]))


BATCHES = [
    (torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), torch.arange(8 * i, 8 * i + 8)) for i in range(5)
]


def test_the_prior_fills_the_rows_and_leaves_the_encoder() -> None:
    encoder, classifier = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D)), new_classifier()
    before = {name: value.clone() for name, value in encoder.named_parameters()}
    classifier.initialize(encoder, BATCHES)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_parameters())
    encoder.eval()
    images, ids = BATCHES[-1]
    torch.testing.assert_close(classifier.state_dict()["weight"][ids], encoder(images).detach())
    with pytest.raises(RuntimeError, match="call refresh_hard_classes"):  # those of the rows before
        classifier(embeddings(), IDS)


def test_the_prior_of_an_encoder_without_batch_norm_moves_its_last_bias() -> None:
    encoder, classifier = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, D)), new_classifier()
    bias = encoder[2].bias.detach().clone()
    classifier.initialize(encoder, BATCHES)
    assert (encoder[2].bias - bias).abs().max() > 1e-3
    images, ids = BATCHES[-1]
    torch.testing.assert_close(classifier.state_dict()["weight"][ids], encoder(images).detach())


def test_given_weights_keep_their_statistics() -> None:
    backbone, head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Linear(6, D)
    new_classifier().initialize(nn.Sequential(backbone, head), BATCHES, pretrained=backbone)
    assert torch.equal(backbone[1].running_mean, torch.zeros(6))


@pytest.mark.parametrize(
    ("encoder", "loader", "wanted"),
    [
        (nn.Linear(4, D), BATCHES[1:], r"no image for 8 of 40 ids \(the first is 0\)"),
        (nn.Linear(4, D), [], "the loader has no batch"),
        (nn.Linear(4, D), [BATCHES[0][0]], "two tensors a batch, not Tensor"),
        (nn.Linear(4, D), [(BATCHES[0][0], BATCHES[4][1] + 1)], "there is a 40"),
        (nn.Linear(4, D), [(BATCHES[0][0], BATCHES[0][1][:3])], r"ids are \(8,\)"),
        (nn.Linear(4, 3), BATCHES, r"the encoder's output is \(8, 3\), not \(b, 8\)"),
    ],
)
def test_a_loader_or_encoder_that_does_not_fit_is_one_line(encoder: nn.Module, loader: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        new_classifier().initialize(encoder, loader)


def test_the_public_name_imports_torch_only_when_it_is_used() -> None:
    code = (
        "import sys, instance_ssl; assert 'InstanceClassifier' in dir(instance_ssl) and 'torch' not in sys.modules; "
        "from instance_ssl import InstanceClassifier; assert 'torch' in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=cpu_environment(), check=True)
    with pytest.raises(AttributeError, match="no attribute 'Absent'"):
        _ = instance_ssl.Absent
