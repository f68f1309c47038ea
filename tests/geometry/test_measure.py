"""The geometry of tiny networks: every value against a computation of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import alignfast as af
from alignfast.geometry import GeometryConfig, GeometryResult, geometry
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES

CONFIG = GeometryConfig(eps=0.1, alpha=0.03, steps=(1, 3), lanczos=12, resamples=200, grid=5, profile=5, samples=3)
COUNT = 5


def network(seed: int, width: int = 6) -> af.Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Softplus(), nn.Linear(width, 3))
    for parameter in module.parameters():
        parameter.data.mul_(2)
    return af.Classifier(module, (0.5,) * 3, (0.25,) * 3, 3, (3, 2, 2))


def batches(size: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (COUNT, 3, 2, 2), generator=generator).float() / 255
    labels, indices = torch.randint(0, 3, (COUNT,), generator=generator), torch.tensor([4, 9, 2, 77, 5])
    return [tuple(part) for part in zip(images.split(size), labels.split(size), indices.split(size), strict=True)]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {"vanilla": network(0), "aligned": network(1)}


@pytest.fixture(scope="module")
def others() -> dict[str, nn.Module]:
    return {"witness": network(2), "target": network(3, 9)}


@pytest.fixture(scope="module")
def result(models: dict[str, nn.Module], others: dict[str, nn.Module]) -> GeometryResult:
    return geometry(models, batches(), CONFIG, others=others)


def values(result: GeometryResult, *key: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    (row,) = [row for row in result.rows if (row.model, row.other, row.point, row.measure) == key]
    return row.values


def everything() -> tuple[Tensor, Tensor, Tensor]:
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    return images, labels, indices


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    return grad.flatten(1).double()


def test_every_measure_at_every_point(result: GeometryResult) -> None:
    points = ("clean", "random", "step 1", "step 3")
    wanted = {
        (model, None, point, measure) for model in ("vanilla", "aligned") for point in points for measure in MEASURES
    }
    wanted |= {
        (model, other, point, measure)
        for model in ("vanilla", "aligned")
        for other in ("witness", "target")
        for point in points
        for measure in PAIR_MEASURES
    }
    assert {(row.model, row.other, row.point, row.measure) for row in result.rows} == wanted
    assert len(result.rows) == len(wanted)
    assert all(row.values.shape == (COUNT,) and np.isfinite(row.values).all() for row in result.rows)
    assert result.indices.tolist() == [4, 9, 2, 77, 5]


def test_gradients_and_losses(result: GeometryResult, models: dict[str, nn.Module]) -> None:
    images, labels, _ = everything()
    for name, model in models.items():
        grad = gradient(model, images, labels)
        loss = nn.functional.cross_entropy(model(images), labels, reduction="none")
        for measure, wanted in (("loss", loss), ("gradient_l1", grad.abs().sum(1)), ("gradient_l2", grad.norm(dim=1))):
            found = values(result, name, None, "clean", measure)
            np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5)


def test_pairs(result: GeometryResult, models: dict[str, nn.Module], others: dict[str, nn.Module]) -> None:
    images, labels, _ = everything()
    mine, theirs = models["aligned"], others["target"]
    cosine = torch.cosine_similarity(gradient(mine, images, labels), gradient(theirs, images, labels))
    p, q = theirs(images).softmax(1), mine(images).softmax(1)
    wanted = {
        "gradient_cosine": cosine,
        "kl": (p * (p / q).log()).sum(1),
        "agreement": (p.argmax(1) == q.argmax(1)).float(),
        "fooled": (p.argmax(1) != labels).float(),
    }
    for measure, expected in wanted.items():
        found = values(result, "aligned", "target", "clean", measure)
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_the_curvature_is_that_of_the_dense_hessian(result: GeometryResult, models: dict[str, nn.Module]) -> None:
    images, labels, _ = everything()
    model = models["vanilla"]
    for row in range(COUNT):

        def loss(flat: Tensor, row: int = row) -> Tensor:
            return nn.functional.cross_entropy(
                model.module((flat.view(1, 3, 2, 2) - 0.5) / 0.25), labels[row : row + 1]
            )

        dense = torch.autograd.functional.hessian(loss, images[row].flatten()).double()
        largest = float(torch.linalg.eigvalsh(dense)[-1])
        assert values(result, "vanilla", None, "clean", "curvature")[row] == pytest.approx(largest, rel=1e-3)
        # A difference quotient over the neighbourhood cannot turn faster than the Hessian somewhere in it.
        assert values(result, "vanilla", None, "clean", "lipschitz")[row] < 3 * float(dense.norm())
    assert values(result, "vanilla", None, "clean", "curvature_residual").max() <= CONFIG.tolerance


def test_points_along_the_attack(result: GeometryResult, models: dict[str, nn.Module]) -> None:
    images, labels, indices = everything()
    for name, model in models.items():
        attack = af.attacks.PGD(model, eps=CONFIG.eps, alpha=CONFIG.alpha, steps=3, seed=0)
        loss = nn.functional.cross_entropy(model(attack(images, labels, indices=indices)), labels, reduction="none")
        np.testing.assert_allclose(values(result, name, None, "step 3", "loss"), loss.detach().numpy(), rtol=1e-4)


def test_the_batch_does_not_matter(
    models: dict[str, nn.Module], others: dict[str, nn.Module], result: GeometryResult
) -> None:
    whole = geometry(models, batches(COUNT), CONFIG, others=others)
    for one, other in zip(whole.rows, result.rows, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-6, err_msg=str(other)[:90])
    assert len(whole.surfaces) == len(result.surfaces) == CONFIG.surfaces
    assert [one.index for one in result.examples] == [4, 9, 2, 77]


def test_estimates_and_differences(result: GeometryResult) -> None:
    before, after = (values(result, name, None, "clean", "curvature") for name in ("vanilla", "aligned"))
    estimate = result.estimate("vanilla", "curvature")
    assert (estimate.mean, estimate.median, estimate.n) == (pytest.approx(before.mean()), np.median(before), COUNT)
    assert before.min() <= estimate.low < estimate.mean < estimate.high <= before.max()
    difference = result.difference("aligned", "curvature")
    assert difference.difference == pytest.approx((after - before).mean())
    assert difference.low < difference.difference < difference.high
    assert difference.baseline == "vanilla"
    assert difference.fell == np.mean(after < before)
    assert (difference.fell_low, difference.fell_high) == pytest.approx(_wilson(difference.fell, COUNT))
    rate = result.estimate("vanilla", "fooled", "step 3", "target")
    assert (rate.low, rate.high) == pytest.approx(_wilson(rate.mean, COUNT))
    with pytest.raises(ValueError, match="was not measured"):
        result.estimate("vanilla", "nothing")
    with pytest.raises(ValueError, match="was not compared"):
        result.difference("vanilla", "curvature")


def _wilson(rate: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    middle, width = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def test_a_surface_is_the_loss_in_its_plane(result: GeometryResult, models: dict[str, nn.Module]) -> None:
    images, labels, indices = everything()
    adv = af.attacks.PGD(models["vanilla"], eps=0.1, alpha=0.03, steps=3, seed=0)(images, labels, indices=indices)
    (first, *_) = result.surfaces
    assert (first.index, first.along) == (4, "vanilla")
    np.testing.assert_allclose(first.x, np.linspace(-0.15, 0.15, 5), rtol=1e-6)
    direction = (adv - images)[0] / (adv - images)[0].abs().max()
    for name, model in models.items():
        line = torch.stack([images[0] + t * direction for t in torch.from_numpy(first.x).float()])
        losses = nn.functional.cross_entropy(
            af.geometry.field.logits_of(model, line), labels[:1].expand(5), reduction="none"
        )
        np.testing.assert_allclose(first.loss[name][2], losses.detach().numpy(), rtol=1e-4)
    # The rows to either side are other points, the same for all models.
    assert not np.allclose(first.loss["vanilla"][1], first.loss["vanilla"][2], rtol=1e-3)


def test_profiles_rise_along_the_gradient(result: GeometryResult) -> None:
    assert result.profile is not None
    np.testing.assert_allclose(result.profile.t, np.linspace(-0.1, 0.1, 5))
    for name, lines in result.profile.loss.items():
        np.testing.assert_allclose(lines[:, 2], values(result, name, None, "clean", "loss"), rtol=1e-5)
        assert (lines[:, 3] > lines[:, 1]).all()


def test_examples_are_the_images_and_what_became_of_them(result: GeometryResult) -> None:
    images, labels, _ = everything()
    for row, example in enumerate(result.examples):
        clean = (images[row] * 255).round().byte().movedim(0, -1).numpy()
        np.testing.assert_array_equal(example.clean, clean)
        assert example.label == int(labels[row])
        for adversarial in example.adversarial.values():
            moved = np.abs(adversarial.astype(int) - clean).max()
            assert 0 < moved <= round(0.1 * 255) + 1


def test_models_are_set_against_each_other_where_there_are_no_others(models: dict[str, nn.Module]) -> None:
    alone = geometry(models, batches(), replace(CONFIG, measures=("loss",), surfaces=0, examples=0))
    pairs = {(row.model, row.other) for row in alone.rows if row.other}
    assert pairs == {("vanilla", "aligned"), ("aligned", "vanilla")}
    assert {row.measure for row in alone.rows if not row.other} == {"loss"}
    assert (alone.surfaces, alone.examples) == ((), ())


def test_finite_differences_come_near(models: dict[str, nn.Module], result: GeometryResult) -> None:
    finite = geometry(models, batches(), replace(CONFIG, second_derivatives="finite", measures=("curvature",)))
    for name in models:
        found, wanted = (values(one, name, None, "clean", "curvature") for one in (finite, result))
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=1e-3)


def test_it_survives_a_file(result: GeometryResult, tmp_path: Any) -> None:
    result.save(tmp_path / "geometry.json")
    read = GeometryResult.load(tmp_path / "geometry.json")
    assert read.to_dict() == result.to_dict()
    assert read.estimates == result.estimates
    np.testing.assert_array_equal(read.surfaces[0].loss["aligned"], result.surfaces[0].loss["aligned"])
    np.testing.assert_array_equal(read.examples[0].adversarial["vanilla"], result.examples[0].adversarial["vanilla"])
    result.save_csv(tmp_path / "geometry.csv")
    lines = (tmp_path / "geometry.csv").read_text().splitlines()
    assert lines[0] == "model,other,point,measure,index,value"
    assert len(lines) == 1 + COUNT * len(result.rows)
    assert lines[1].startswith(f"{result.rows[0].model},,clean,{result.rows[0].measure},4,")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rows": 1}'])
def test_files_of_another_kind_are_refused(text: str, tmp_path: Any) -> None:
    (tmp_path / "geometry.json").write_text(text)
    with pytest.raises(ValueError, match=r"give a geometry\.json"):
        GeometryResult.load(tmp_path / "geometry.json")


def test_nan_is_left_out_of_the_mean() -> None:
    """A network that gives the same logits everywhere has no gradient, and no cosine."""
    flat = network(0)
    flat.module[3].weight.data.zero_()
    found = geometry({"flat": flat}, batches(), CONFIG, others={"other": network(1)})
    cosine = found.estimate("flat", "gradient_cosine", "clean", "other")
    assert (math.isnan(cosine.mean), cosine.n) == (True, 0)
    assert found.estimate("flat", "curvature").mean == 0.0


class OnlyOnce(nn.Module):
    """Hardsigmoid's gradient has none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.hardsigmoid(self.linear(images.flatten(1)) ** 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models: got none"),
        ({"data": []}, "data: holds no image"),
        ({"baseline": "vanila"}, "baseline: got 'vanila'.*did you mean 'vanilla'"),
        ({"config": replace(CONFIG, along="mine")}, "along: got 'mine'"),
        ({"data": [(torch.rand(2, 3, 2, 2), torch.tensor([0, 3]))]}, r"labels for vanilla: .* allowed is \[0, 2\]"),
        ({"data": [(2 * torch.ones(2, 3, 2, 2), torch.tensor([0, 1]))]}, r"images of batch 0: values span"),
        ({"others": {"many": af.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))}}, "classes differ"),
        (
            {"models": {"once": af.Classifier(OnlyOnce(), num_classes=3)}},
            "models: once: second_derivatives: .*'finite'",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, models: dict[str, nn.Module]) -> None:
    given = {"models": models, "data": batches(), "config": CONFIG} | change
    with pytest.raises(ValueError, match=message):
        geometry(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": {"eps": 1}}, "attack: .* without a name"),
        ({"attack": {"name": "pgdd"}}, "attack: got 'pgdd'"),
        ({"attack": {"name": "pgd", "eps": 0.1}}, "unknown parameter 'eps'"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"steps": ()}, "steps: got"),
        ({"steps": (5, 2)}, "rising"),
        ({"measures": ("curvatur",)}, "unknown measure 'curvatur'.*did you mean 'curvature'"),
        ({"second_derivatives": "none"}, "second_derivatives: got 'none'"),
        ({"grid": 2}, "grid: got 2"),
        ({"radius": -1.0}, "radius: got -1"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
