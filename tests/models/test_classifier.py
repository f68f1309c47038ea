import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision.transforms.functional import normalize

from alignfast.models import Classifier, as_classifier, evaluating, fit_size, in_range
from tests import cases

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TEN = {"mean": MEAN, "std": STD, "num_classes": 10}


def module(channels=3, side=6, classes=10, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def images(*shape, dtype=torch.float32, seed=1):
    return cases.random(shape or (4, 3, 6, 6), seed, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_the_modules_on_normalised_images(dtype):
    inner = module().to(dtype)
    x = images(dtype=dtype)
    wanted = inner(normalize(x, MEAN, STD))
    model = Classifier(inner, **TEN).to(dtype)
    for logits in (model(x), model.logits(x), model.heads(lambda mean, std, *_: normalize(x, MEAN, STD))[0]):
        torch.testing.assert_close(logits, wanted)
    assert model.heads(lambda mean, std, *_: normalize(x, MEAN, STD)).shape == (1, 4, 10)
    assert model(x[:0]).shape == (0, 10)


def test_without_mean_and_std_the_module_is_given_the_images():
    inner = nn.Flatten()
    x = images()
    assert torch.equal(Classifier(inner)(x), x.flatten(1))
    seen = []
    Classifier(inner).logits_of(lambda mean, std, *_: seen.append((mean, std)) or x)
    assert seen == [(None, None)]


def test_the_gradient_is_divided_by_std():
    x = images().requires_grad_()
    weight = cases.normal((4, 108), 2, torch.float32)
    (Classifier(nn.Flatten(), MEAN, STD)(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.view_as(x) / torch.tensor(STD)[:, None, None])


def test_any_number_of_channels():
    x = images(2, 5, 3, 3)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 0.5, 0.25, 0.2, 0.1]
    torch.testing.assert_close(Classifier(nn.Flatten(), mean, std)(x).view_as(x), normalize(x, mean, std))


def test_normalisation_moves_with_the_model_and_stays_out_of_its_weights():
    model = Classifier(module(), **TEN)
    assert sorted(model.state_dict()) == ["module.1.bias", "module.1.weight"]
    twin = copy.deepcopy(model).double()
    assert twin.mean.dtype == torch.float64
    assert model.mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "mean, std: got one of them; allowed is both or neither"),
        ({"std": None}, "mean, std: got one of them"),
        ({"std": (0.2, 0.2)}, "std: got 2 values for 3 of mean"),
        ({"std": (0.2, 0.0, 0.2)}, "std: got .* allowed are numbers greater than 0"),
        ({"std": (0.2, -0.1, 0.2)}, "std: got"),
        ({"std": (0.2, float("nan"), 0.2)}, "std: got"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"input_size": (3, 0, 6)}, "input_size: got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Classifier(module(), **{**TEN, **change})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(3, 6, 6), r"images: got shape \[3, 6, 6\]"),
        (images(2, 1, 6, 6), r"images: got shape \[2, 1, 6, 6\]; allowed is \[any, 3, any, any\]"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), "images: got dtype torch.uint8; allowed is floating point"),
        (torch.full((2, 3, 6, 6), float("nan")), "images: contains NaN"),
        (images() * 255, r"images: values span \[.*\]; allowed is \[0, 1\] \(divide 8-bit images by 255"),
        (images() - 0.5, "images: values span"),
        (images().index_fill(3, torch.tensor(5), float("inf")), "images: values span"),
    ],
)
def test_bad_images_are_refused(x, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Classifier(module(), **TEN)(x)


def test_images_of_another_than_the_input_size_are_refused():
    model = Classifier(nn.Flatten(), input_size=(3, 6, 6))
    assert model(images()).shape == (4, 108)
    with pytest.raises(ValueError, match=r"images: got shape \[4, 3, 6, 7\]; allowed is \[any, 3, 6, 6\]"):
        model(images(4, 3, 6, 7))


def test_the_values_of_images_in_an_attack_are_not_read():
    """A look-ahead may leave [0, 1]."""
    x = (images() * 3 - 1).requires_grad_()
    model = Classifier(module(), **TEN)
    assert model(x).requires_grad
    with pytest.raises(ValueError, match="images: values span"):
        model(x.detach())
    with pytest.raises(ValueError, match="images: got shape"):
        model(x[0])


def test_as_classifier():
    model = Classifier(module(), **TEN)
    assert as_classifier(model) is model
    inner = module()
    wrapped = as_classifier(inner)
    assert isinstance(wrapped, Classifier)
    assert wrapped.module is inner
    assert (wrapped.mean, wrapped.std, wrapped.num_classes, wrapped.input_size) == (None,) * 4
    with pytest.raises(TypeError, match=r"^model: got str; allowed is a torch.nn.Module"):
        as_classifier("resnet50")


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Sequential(nn.ReLU(), nn.Dropout()))
        self.body[0].eval()
        self.body[2][1].eval()


@pytest.mark.parametrize("failing", [False, True])
def test_evaluating_restores_the_mode_of_every_module(failing):
    first, second = Mixed(), Classifier(Mixed().eval())
    shared = nn.ModuleList([first.body, second])
    modes = [module.training for model in (first, second, shared) for module in model.modules()]
    assert len(set(modes)) == 2

    def inside():
        with evaluating(first, second, shared):
            assert not any(module.training for model in (first, second, shared) for module in model.modules())
            if failing:
                raise KeyboardInterrupt

    if failing:
        with pytest.raises(KeyboardInterrupt):
            inside()
    else:
        inside()
    assert [module.training for model in (first, second, shared) for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("size", [(5, 4), (13, 20), (10, 4)])
def test_fit_size_resamples_to_the_models_size(size, dtype):
    x = images(2, 3, 10, 9, dtype=dtype)
    fitted = fit_size(x, Classifier(nn.Flatten(), input_size=(3, *size)))
    wanted = interpolate(x.double(), size=size, mode="bilinear", antialias=True)
    assert fitted.dtype == dtype
    torch.testing.assert_close(fitted.double(), wanted, rtol=0, atol=max(1e-6, torch.finfo(dtype).eps))
    assert bool(((fitted >= 0) & (fitted <= 1)).all())


def test_fit_size_leaves_what_fits():
    x = images()
    assert fit_size(x, Classifier(nn.Flatten())) is x
    assert fit_size(x, Classifier(nn.Flatten(), input_size=(3, 6, 6))) is x


def test_fit_size_passes_gradients():
    x = cases.random((1, 1, 5, 5), 3, low=0.1, high=0.9).requires_grad_()
    model = Classifier(nn.Flatten(), input_size=(1, 3, 4))
    assert torch.autograd.gradcheck(lambda x: fit_size(x, model), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("side", "model_side"), [(10, 6), (96, 32), (6, 10)])
def test_black_and_white_images_of_another_size_have_gradients(side, model_side, dtype):
    """Where resizing leads some pixels of a white image beyond 1, by rounding. The model is linear."""
    model = Classifier(module(side=model_side), input_size=(3, model_side, model_side), **TEN).to(dtype)
    gradients = []
    for level in (0.0, 0.5, 1.0):
        x = torch.full((1, 3, side, side), level, dtype=dtype, requires_grad=True)
        model.logits(fit_size(x, model))[0, 3].backward()
        gradients.append(x.grad)
    black, grey, white = gradients
    assert bool((grey != 0).all())
    assert torch.equal(black, grey)
    assert torch.equal(white, grey)


def test_the_ends_of_the_range_have_a_derivative():
    x = torch.tensor([-0.5, -1e-7, 0.0, 0.25, 1.0, 1 + 2e-7, 1.5, torch.inf], requires_grad=True)
    y = in_range(x)
    assert torch.equal(y.detach(), torch.tensor([0.0, 0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 1.0]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]))


def test_networks_with_auxiliary_heads_give_their_logits():
    class Tuple(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)), images.sum((2, 3))

    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(Classifier(Tuple())(images), images.mean((2, 3)))
