from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from alignfast.alignment import AlignConfig, align
from alignfast.models import Classifier, fit_size, load_checkpoint

SIDE, CLASSES, BATCH, STEPS = 8, 5, 6, 20
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class Network(nn.Sequential):
    def __init__(
        self, seed: int, width: int = 6, side: int = SIDE, dropout: float = 0.0, classes: int = CLASSES
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(
                nn.Conv2d(3, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Flatten(),
                nn.Linear(width * side * side, classes),
            )
        self[1].running_mean.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(seed))
        self[1].weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed + 1))


def classifier(seed: int, **options: Any) -> Classifier:
    return Classifier(Network(seed, **options), MEAN, STD, options.get("classes", CLASSES))


def batches(count: int = STEPS, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    images = torch.rand((count, size, 3, SIDE, SIDE), generator=generator)
    labels = torch.randint(CLASSES, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))


def config_of(**changes: Any) -> AlignConfig:
    return AlignConfig(**({"lr": 0.05} | changes))


def plain_loop(
    source: Classifier, witnesses: list[Classifier], data: list[tuple[Tensor, Tensor]], config: AlignConfig
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The recipe with nothing but PyTorch."""
    model = copy.deepcopy(source.module).train()
    if config.batch_norm == "freeze":
        model[1].eval()
    teachers = [copy.deepcopy(witness.module).eval() for witness in witnesses]
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    t, seen = config.temperature, []
    for images, labels in data:
        x = (images - mean) / std
        logits = model(x)
        per_sample = []
        for teacher in teachers:
            with torch.no_grad():
                p = softmax(teacher(x) / t, 1)
            per_sample.append(kl_div(log_softmax(logits / t, 1), p, reduction="none").sum(1) * t**2)
        table = torch.stack(per_sample)
        kd = {"mean": table.mean(0), "max": table.max(0).values, "min": table.min(0).values}[config.combine].mean()
        loss = config.lambda_kd * kd
        if config.lambda_cls:
            loss = loss + config.lambda_cls * cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        if config.clip_norm is not None and norm > config.clip_norm:
            for parameter in model.parameters():
                parameter.grad *= config.clip_norm / norm
        seen.append({"lr": optimizer.param_groups[0]["lr"], "loss": loss.item(), "kd": kd.item(), "grad_norm": norm})
        optimizer.step()
        schedule.step()
    return model, seen


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


WITNESSES = [11, 12, 13]
RECIPES: dict[str, tuple[int, dict[str, Any]]] = {
    "paper": (1, {}),
    "temperature": (1, {"temperature": 1.5}),
    "no momentum": (1, {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    "heavy ball": (1, {"nesterov": False, "weight_decay": 0.01}),
    "mean": (3, {"combine": "mean"}),
    "max": (3, {"combine": "max"}),
    "min": (3, {"combine": "min"}),
    "labels": (1, {"lambda_cls": 0.7}),
    "weights": (2, {"lambda_kd": 0.3, "lambda_cls": 1.5, "combine": "max"}),
    "clip": (1, {"clip_norm": 0.5}),
    "frozen": (1, {"batch_norm": "freeze"}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_equal_a_plain_loop(recipe: str) -> None:
    count, changes = RECIPES[recipe]
    source, witnesses, data = classifier(0), [classifier(seed) for seed in WITNESSES[:count]], batches()
    config = config_of(**changes)
    expected, seen = plain_loop(source, witnesses, data, config)
    result = align(source, witnesses[0] if count == 1 else witnesses, data, config)
    assert distance(result.model.module, expected) < 1e-6
    assert distance(source.module, expected) > 1e-2
    for entry, wanted in zip(result.history, seen, strict=True):
        for name, value in wanted.items():
            assert entry[name] == pytest.approx(value, rel=1e-4), name


def test_the_recipes_differ() -> None:
    """Otherwise the test above could not see that an option is ignored."""
    data, witnesses = batches(), [classifier(seed) for seed in WITNESSES]
    ends = {}
    for recipe, (count, changes) in RECIPES.items():
        ends[recipe], seen = plain_loop(classifier(0), witnesses[:count], data, config_of(**changes))
        assert recipe != "clip" or sum(entry["grad_norm"] > 0.5 for entry in seen) > 5
    names = list(RECIPES)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert distance(ends[first], ends[second]) > 1e-4, (first, second)


def test_labels_alone() -> None:
    calls = []
    witness = classifier(11)
    witness.module.register_forward_hook(lambda *_: calls.append(1))
    data = batches(5)
    result = align(classifier(0), witness, data, config_of(lambda_kd=0.0, lambda_cls=2.0))
    assert not calls
    assert all(entry["kd"] is None for entry in result.history)
    assert all(entry["loss"] == pytest.approx(2 * entry["cls"]) for entry in result.history)


def test_labels_are_not_read_without_their_term() -> None:
    data = [(images, torch.full_like(labels, -7)) for images, labels in batches(5)]
    same = align(classifier(0), classifier(11), data, config_of())
    assert distance(same.model, align(classifier(0), classifier(11), batches(5), config_of()).model) == 0
    with pytest.raises(ValueError, match=r"labels: values span \[-7, -7\]"):
        align(classifier(0), classifier(11), data, config_of(lambda_cls=1.0))


@pytest.mark.parametrize("mode", ["move", "freeze"])
def test_running_statistics(mode: Any) -> None:
    source = classifier(0)
    before = copy.deepcopy(source.module[1])
    after = align(source, classifier(11), batches(), config_of(batch_norm=mode)).model.module[1]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(after, name), getattr(before, name)) == (mode == "freeze"), name
    for name in ("weight", "bias"):
        assert (getattr(after, name) - getattr(before, name)).abs().max() > 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_autocast(precision: Any) -> None:
    """Of the source; witnesses have weights in half precision."""
    source, witness = classifier(0), classifier(11)
    seen: list[torch.dtype] = []
    for layer in (source.module[0], source.module[5]):
        layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype) if _.training else None)
    result = align(source, witness, batches(), config_of(precision=precision))
    assert seen == [getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])] * 2 * STEPS
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in source.parameters()} == {torch.float32}
    assert all(math.isfinite(entry["loss"]) for entry in result.history)
    full = align(classifier(0), witness, batches(), config_of())
    gap = distance(result.model, full.model)
    assert 0 < gap < 0.1
    seen.clear()
    align(source, witness, batches(2), config_of())
    assert seen == [torch.float32] * 4


@pytest.mark.parametrize("training", [False, True])
def test_source_and_witness_are_left_as_they_were(training: bool) -> None:
    models = {"source": classifier(0).train(training), "witness": classifier(11).train(training)}
    models["witness"].module[3].train(not training)
    states = {role: copy.deepcopy(model.state_dict()) for role, model in models.items()}
    modes = {role: [module.training for module in model.modules()] for role, model in models.items()}
    data = batches(3)
    kept = [(images.clone(), labels.clone()) for images, labels in data]
    inside: list[bool] = []
    models["witness"].module.register_forward_hook(
        lambda module, *_: inside.extend(m.training for m in module.modules())
    )
    result = align(models["source"], models["witness"], data, config_of())
    for role, model in models.items():
        for name, value in model.state_dict().items():
            assert torch.equal(value, states[role][name]), (role, name)
        assert [module.training for module in model.modules()] == modes[role]
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert inside
    assert not any(inside)
    assert result.model is not models["source"]
    assert not result.model.training
    for (images, labels), (was, truth) in zip(data, kept, strict=True):
        assert torch.equal(images, was)
        assert torch.equal(labels, truth)


def test_in_place() -> None:
    source = classifier(0)
    expected = align(source, classifier(11), batches(), config_of()).model
    result = align(source, classifier(11), batches(), config_of(), in_place=True)
    assert result.model is source
    assert distance(source, expected) == 0


def test_only_parameters_that_require_a_gradient_are_trained() -> None:
    source = classifier(0)
    for parameter in source.module[0].parameters():
        parameter.requires_grad_(False)
    after = align(source, classifier(11), batches(), config_of()).model
    assert torch.equal(after.module[0].weight, source.module[0].weight)
    assert not torch.equal(after.module[5].weight, source.module[5].weight)


def test_bare_modules() -> None:
    bare = align(Network(0), Network(11), batches(3), config_of())
    wrapped = align(Classifier(Network(0)), Classifier(Network(11)), batches(3), config_of())
    assert isinstance(bare.model, Classifier)
    assert distance(bare.model, wrapped.model) == 0


def test_history_and_schedule() -> None:
    config = config_of(lr=0.1, lambda_cls=0.5)
    result = align(classifier(0), classifier(11), batches(13), config)
    assert result.config is config
    assert [entry["step"] for entry in result.history] == list(range(1, 14))
    for entry in result.history:
        assert set(entry) == {"step", "lr", "loss", "kd", "cls", "grad_norm"}
        assert all(type(value) is float for name, value in entry.items() if name != "step")
        assert entry["loss"] == pytest.approx(entry["kd"] + 0.5 * entry["cls"], rel=1e-5)
        assert entry["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * (entry["step"] - 1) / 13)))
    assert result.history[-1]["lr"] < 0.002
    plain = align(classifier(0), classifier(11), batches(2), config_of())
    assert [entry["cls"] for entry in plain.history] == [None, None]


def test_alignment_aligns() -> None:
    source, witness = classifier(0), classifier(11)
    result = align(source, witness, batches(), config_of(epochs=5, lr=0.1))
    images = torch.cat([images for images, _ in batches()])
    with torch.no_grad():
        agreement = [
            (m.eval()(images).argmax(1) == witness.eval()(images).argmax(1)).float().mean()
            for m in (source, result.model)
        ]
    assert agreement[1] > agreement[0] + 0.2
    assert result.history[-1]["kd"] < 0.3 * result.history[0]["kd"]


class Loader:
    """Five batches of which the order depends on the epoch, as a DistributedSampler's does."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.read = 0

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = batches(5)
        for number in range(5):
            self.read += 1
            yield data[(number + self.epochs[-1]) % 5]


@pytest.mark.parametrize(
    ("changes", "steps", "epochs"),
    [
        ({}, 5, [0]),
        ({"epochs": 3}, 15, [0, 1, 2]),
        ({"steps": 3}, 3, [0]),
        ({"steps": 5}, 5, [0]),
        ({"steps": 12}, 12, [0, 1, 2]),
        ({"steps": 7, "epochs": 9}, 7, [0, 1]),
    ],
)
def test_steps_and_epochs(changes: dict[str, Any], steps: int, epochs: list[int]) -> None:
    loader = Loader()
    result = align(classifier(0), classifier(11), loader, config_of(**changes))
    assert len(result.history) == steps
    assert loader.epochs == epochs
    assert loader.read == steps
    order = [batches(5)[(i + epoch) % 5] for epoch in range(3) for i in range(5)][:steps]
    assert distance(result.model.module, plain_loop(classifier(0), [classifier(11)], order, config_of())[0]) < 1e-6


def test_an_iterator_with_a_number_of_steps() -> None:
    result = align(classifier(0), classifier(11), iter(batches(6)), config_of(steps=4))
    assert len(result.history) == 4
    assert distance(result.model, align(classifier(0), classifier(11), batches(4), config_of()).model) == 0


def test_dropout_follows_the_seed_and_nothing_else() -> None:
    def run(seed: int, state: int) -> Classifier:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model = align(classifier(0, dropout=0.5), classifier(11), batches(5), config_of(seed=seed)).model
        assert torch.equal(torch.get_rng_state(), before)
        return model

    assert distance(run(1, 5), run(1, 6)) == 0
    assert distance(run(1, 5), run(2, 5)) > 1e-4


def test_a_witness_of_another_size_sees_the_images_resized() -> None:
    witness = classifier(11, side=4)
    witness.input_size = (3, 4, 4)
    seen: list[Tensor] = []
    witness.module.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    data = batches(2)
    align(classifier(0), [witness, classifier(12)], data, config_of())
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    # Behind the few images on which folding is verified.
    for shown, (images, _) in zip([one for one in seen if len(one) == BATCH], data, strict=True):
        assert shown.shape == (BATCH, 3, 4, 4)
        torch.testing.assert_close(shown, (fit_size(images, witness) - mean) / std)


def test_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "aligned.safetensors"
    path.write_bytes(b"an older run")
    result = align(classifier(0), classifier(11), batches(3), config_of(), checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == ["aligned.safetensors"]
    fresh = classifier(5)
    load_checkpoint(fresh, path)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "aligned.safetensors"
    path.write_bytes(b"an older run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        align(classifier(0), classifier(11), batches(2), config_of(), checkpoint=path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["aligned.safetensors"]
    assert path.read_bytes() == b"an older run"


class NoLength:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(batches(2))


class Promising(NoLength):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(2) if not hasattr(self, "used") else ()
        self.used = True


def with_images(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images, torch.zeros(len(images), dtype=torch.int64))]


def frozen() -> Classifier:
    model = classifier(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


IMAGES = torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("source", "witness", "loader", "message"),
    [
        (
            classifier(0),
            classifier(1, classes=4),
            batches(1),
            "witness: has 4 classes; allowed is that of the source, 5",
        ),
        (classifier(0), [classifier(1), classifier(1, classes=6)], batches(1), "witness: has 6 classes"),
        (classifier(0), [], batches(1), "witness: got none"),
        (frozen(), classifier(1), batches(1), "source: has no parameter that requires a gradient"),
        (classifier(0), classifier(1), [], "loader: holds no batch"),
        (classifier(0), classifier(1), NoLength(), "loader: has no length"),
        (classifier(0), classifier(1), 3, "loader: "),
        (classifier(0), classifier(1), Promising(), "loader: gave 2 batches; allowed is the 3 that it promised"),
        (classifier(0), classifier(1), with_images(IMAGES[:0]), "loader: its first batch is empty"),
        (classifier(0), classifier(1), with_images(IMAGES * 255), r"images.*: values span .*; allowed is \[0, 1\]"),
        (classifier(0), classifier(1), with_images(IMAGES - 0.5), "images.*: values span"),
        (classifier(0), classifier(1), with_images(IMAGES * math.nan), "images.*: contains NaN"),
        (classifier(0), classifier(1), with_images(IMAGES[:, :1]), r"images: got shape \[2, 1, 8, 8\]"),
        (classifier(0), classifier(1), with_images((IMAGES * 255).byte()), "images of batch 0 are torch.uint8"),
    ],
)
def test_bad_input(source: Any, witness: Any, loader: Any, message: str) -> None:
    states = copy.deepcopy(source.state_dict())
    calls: list[int] = []
    hook = source.module.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message) as raised:
        align(source, witness, loader, config_of())
    hook.remove()
    assert "\n" not in str(raised.value)
    assert not calls or isinstance(loader, Promising)
    assert all(torch.equal(value, states[name]) for name, value in source.state_dict().items())


def test_sources_that_are_no_modules() -> None:
    with pytest.raises(TypeError, match="model: got function"):
        align(lambda x: x, classifier(1), batches(1))


def test_classes_that_are_not_known_beforehand() -> None:
    with pytest.raises(ValueError, match=r"teacher: got shape \[6, 4\]"):
        align(Network(0), Network(1, classes=4), batches(1))


@pytest.mark.parametrize(("poisoned", "size"), [(4, 20), (12, 13), (1, 1)])
def test_a_loss_that_is_not_finite(poisoned: int, size: int, tmp_path: Path) -> None:
    """NaN in an image that is not of the first batch, whose values alone are checked, or in the weights."""
    source, data = classifier(0), batches(size)
    if poisoned == 1:
        source.module[5].bias.data[2] = math.nan
    else:
        data[poisoned - 1][0][0, 0, 0, 0] = math.nan
    states = copy.deepcopy(source.state_dict())
    path = tmp_path / "aligned.safetensors"
    with pytest.raises(
        FloatingPointError, match=rf"loss: nan at step {poisoned}, batch {poisoned} of pass 1, of learning rate"
    ):
        align(source, classifier(11), data, config_of(), checkpoint=path)
    for name, value in source.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), states[name].nan_to_num(9.0)), name
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"direction": "foward"}, r"direction: got 'foward' \(did you mean 'forward'\?\)"),
        ({"combine": "sum"}, "combine: got 'sum'"),
        ({"lambda_kd": -1.0}, "lambda_kd: got -1.0"),
        ({"lambda_cls": -0.1}, "lambda_cls: got -0.1"),
        ({"lambda_kd": 0.0}, "lambda_kd, lambda_cls, lambda_self: got 0 for all"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"lr": -1e-3}, "lr: got -0.001"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"lr": "1e-3"}, "lr: got '1e-3'"),
        ({"momentum": -0.1}, "momentum: got -0.1"),
        ({"momentum": 0.0}, "nesterov: got True with momentum 0"),
        ({"weight_decay": -1e-4}, "weight_decay: got -0.0001"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"epochs": 1.5}, "epochs: got 1.5"),
        ({"steps": 0}, "steps: got 0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm: got -1.0"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"loss": "ce"}, "loss: got 'ce'"),
        ({"lambda_self": -1.0}, "lambda_self: got -1.0"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"ema": 1.5}, "ema: got 1.5"),
        ({"patience": 0}, "patience: got 0"),
        ({"check_every": 0}, "check_every: got 0"),
        ({"embeddings": ("rkd",)}, "embeddings: got 'rkd'; allowed are losses such as"),
        ({"schedule": "step"}, "schedule: got 'step'"),
        ({"batch_norm": "eval"}, "batch_norm: got 'eval'"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_settings_outside_their_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**changes)


def test_defaults_are_the_papers_recipe() -> None:
    config = AlignConfig()
    assert (config.temperature, config.direction, config.lambda_kd, config.lambda_cls) == (4.0, "forward", 1.0, 0.0)
    assert (config.lr, config.momentum, config.weight_decay, config.nesterov) == (1e-3, 0.9, 1e-4, True)
    assert (config.epochs, config.steps, config.clip_norm, config.batch_norm) == (1, None, None, "move")


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    result = align(classifier(0), classifier(11), batches(3), config_of(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("align: 3/3 steps, ")
    assert re.search(rf"loss {result.history[-1]['loss']:.4f}, \d+ images/s\n$", captured.err)
    align(classifier(0), classifier(11), batches(3), config_of())
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: got .*allowed is a \.safetensors file"):
        align(torch.nn.Identity(), torch.nn.Identity(), iter(()), checkpoint=tmp_path / "aligned.pt")


def test_a_constant_rate() -> None:
    history = align(classifier(0), classifier(1), batches(), config_of(schedule="constant")).history
    assert {entry["lr"] for entry in history} == {0.05}
    assert len(history) == STEPS
