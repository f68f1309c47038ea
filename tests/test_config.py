"""Matrix files: what they may say, and one line about what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch import nn

from alignfast import config as module
from alignfast.config import MatrixConfig, defences_in
from alignfast.models import BitDepth, Classifier, Defended, Jpeg, RandomizedSmoothing, RandomResizePad

BASE = {
    "data": "photos",
    "sources": {"vanilla": "timm:resnet50"},
    "targets": {"vgg": "torchvision:vgg19_bn", "vit": {"model": "timm:vit_base_patch16_224"}},
    "attacks": {"mi": {"name": "mifgsm"}},
}
DEFENCES = {"jpeg75": {"name": "jpeg", "quality": 75}, "both": [{"name": "jpeg"}, {"name": "bit_depth", "bits": 3}]}


def read(folder: Path, text: str | None = None, **changes: object) -> MatrixConfig:
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(BASE | changes, sort_keys=False) if text is None else text)
    return MatrixConfig.read(path)


def test_every_attack_at_every_budget_under_the_texts_of_the_file(tmp_path: Path) -> None:
    attacks = {
        "mi": {"name": "mifgsm", "eps": "8/255", "alpha": "2/255", "steps": 5},
        "usual": {"name": "bim"},
        "one step": {"name": "fgsm"},
        "even": {"name": "vmifgsm", "alpha": "1/255"},
    }
    found = read(tmp_path, budgets=["2/255", "4/255", 0.1], attacks=attacks).attacks
    assert list(found) == [f"{name} {radius}" for name in attacks for radius in ("2/255", "4/255", "0.1")]
    for text, eps in (("2/255", 2 / 255), ("4/255", 4 / 255), ("0.1", 0.1)):
        assert found[f"mi {text}"]["eps"] == eps
        assert found[f"mi {text}"]["steps"] == 5
        # A quarter of eps, as the attack gives them, and as the preset has them.
        assert found[f"mi {text}"]["alpha"] == pytest.approx(eps / 4)
        assert found[f"usual {text}"]["alpha"] == pytest.approx(eps / 4)
        assert "alpha" not in found[f"one step {text}"]
        # An eighth, of the preset's eps.
        assert found[f"even {text}"]["alpha"] == pytest.approx(eps / 8)
    assert read(tmp_path).attacks == {"mi": {"name": "mifgsm"}}


def test_a_step_that_follows_eps_by_itself_is_left_to_it(tmp_path: Path) -> None:
    (found,) = read(tmp_path, budgets=["4/255"], attacks={"a": {"name": "pifgsm"}}).attacks.values()
    assert "alpha" not in found


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], r"budgets is \[\]; allowed is a list of at least one"),
        (None, "budgets is None"),
        ("4/255", "budgets is '4/255'"),
        (["4/x"], r"config: budgets\[0\]: got '4/x'; allowed is a number or a fraction"),
        (["4/255", 0], r"config: budgets\[1\]: got 0.0; allowed is a number greater than 0"),
        ([-0.1], r"config: budgets\[0\]: got -0.1"),
        ([float("nan")], r"config: budgets\[0\]: got nan"),
        ([True], r"config: budgets\[0\]: got True"),
        ([[1]], r"config: budgets\[0\]: got \[1\]"),
        (["4/255", "4/255"], "allowed is each radius once"),
        (["2/10", 0.2], "config: budgets: got 2/10, 0.2; allowed is each radius once"),
    ],
)
def test_budgets_that_are_none(tmp_path: Path, budgets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, budgets=budgets)


def test_targets_are_measured_without_and_with_each_of_their_defences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []

    def build(spec: object) -> Classifier:
        built.append(spec)
        return Classifier(nn.Identity(), num_classes=3)

    monkeypatch.setattr(module, "build_model", build)
    targets = {"vgg": "torchvision:vgg19_bn", "vit": {"model": "timm:x", "defences": ["both"]}}
    config = read(tmp_path, defences=DEFENCES, defend=["jpeg75"], targets=targets)
    assert config.measured() == ["vgg", "vgg + jpeg75", "vit", "vit + both"]
    models = config.build_targets()
    assert list(models) == config.measured()
    assert built == ["torchvision:vgg19_bn", {"model": "timm:x"}]
    defended = models["vit + both"]
    assert isinstance(defended, Defended)
    assert defended.undefended is models["vit"]
    assert defended.defences == (Jpeg(), BitDepth(3))
    every = read(tmp_path, defences=DEFENCES, defend="all", targets=targets | {"u": {"model": "m", "defences": []}})
    assert every.measured() == ["vgg", "vgg + jpeg75", "vgg + both", "vit", "vit + both", "u"]


def test_numbers_of_defences_may_be_fractions() -> None:
    spec = [{"name": "smoothing", "sigma": "1/4", "samples": "8", "by": "probabilities"}, {"name": "resize_pad"}]
    assert defences_in("d", spec) == (RandomizedSmoothing(0.25, 8, "probabilities"), RandomResizePad())


LONG = "x" * 201


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgts": ["4/255"]}, r"unknown key 'budgts' \(did you mean 'budgets'\?\)"),
        ({"sources": {"s": {"modle": "x"}}}, r"sources.s: got unknown key 'modle' \(did you mean 'model'\?\)"),
        ({"sources": {"s": {"model": "x", "defences": []}}}, "sources.s: got unknown key 'defences'"),
        ({"sources": {"s": {"ensemble": [{"model": "x", "chekpoint": "y"}]}}}, r"ensemble\[0\]: .*'checkpoint'"),
        ({"sources": {"s": {"ensemble": []}}}, "sources.s.ensemble: got"),
        ({"sources": {"s": {"ensemble": ["a"], "combine": "logit"}}}, "did you mean 'logits'"),
        ({"targets": {"t": {"model": "x", "defense": []}}}, "targets.t: .*did you mean 'defences'"),
        ({"attacks": {"a": {"name": "mifgsm", "decai": 1}}}, "attacks.a: .*did you mean 'decay'"),
        ({"defences": {"j": {"name": "jpg"}}, "defend": "all"}, "defences.j.name: got 'jpg' .*did you mean 'jpeg'"),
        ({"defences": {"j": {"name": "jpeg", "qualty": 5}}, "defend": "all"}, "defences.j: .*did you mean 'quality'"),
        ({"defences": {"j": {"name": "jpeg", "quality": 0}}, "defend": "all"}, "defences.j.quality: got 0; allowed is"),
        (
            {"defences": {"j": [{"name": "jpeg"}, {"name": "bit_depth", "bits": 9}]}, "defend": "all"},
            r"defences.j\[1\]",
        ),
        ({"defences": {"j": []}, "defend": "all"}, r"defences.j: got \[\]"),
        ({"defences": {"j": "jpeg"}, "defend": "all"}, "defences.j: got 'jpeg'"),
        ({"defences": {}}, r"defences is \{\}"),
        ({"defences": DEFENCES}, "defences: no target has both; list it"),
        ({"defences": DEFENCES, "defend": "al"}, "config: defend: got 'al' .*did you mean 'all'"),
        ({"defences": DEFENCES, "defend": ["jpeg7"]}, "config: defend: got 'jpeg7' .*did you mean 'jpeg75'"),
        ({"defences": DEFENCES, "defend": ["both", "both"]}, "config: defend: got both, both; allowed is each once"),
        ({"defend": ["jpeg75"]}, "there are no defences"),
        ({"targets": {"t": {"model": "x", "defences": "jpeg75"}}}, "targets.t.defences: got 'jpeg75'"),
        ({"sources": {"A": "x", "a": "y"}}, "sources: 'A' and 'a' would be kept in one file"),
        ({"attacks": {"mi": {"name": "mifgsm"}, "MI": {"name": "bim"}}}, "attacks: 'mi' and 'MI' would be kept"),
        (
            {"targets": {"t": "x", "t + j": "y"}, "defences": {"j": {"name": "jpeg"}}, "defend": ["j"]},
            r"targets: 't \+ j' and 't \+ j' would be kept in one file",
        ),
        ({"sources": {1: "x"}}, "sources: got the name 1; allowed is text"),
        ({"sources": {"": "x"}}, "sources: got the name ''"),
        ({"sources": {LONG: "x"}}, "takes 201 letters in a file's name; allowed are 200"),
        ({"baseline": "vanila"}, "config: baseline: got 'vanila' .*did you mean 'vanilla'"),
        ({"qualified": "yes"}, "config: qualified: got 'yes'; allowed is true or false"),
        ({"batch_size": 0}, "config: batch_size: got 0"),
        ({"limit": "ten"}, "config: limit: got 'ten'"),
    ],
)
def test_faults(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, **changes)
    assert "\n" not in str(raised.value)


TWICE = """\
data: photos
sources: {a: "timm:x"}
targets:
  t: "timm:x"
  u: {model: "timm:y", num_classes: 3, model: "timm:z"}
attacks: {mi: {name: mifgsm}}
"""


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config: model: given in lines 5 and 5; allowed is once"):
        read(tmp_path, TWICE)
    fine = TWICE.replace(', model: "timm:z"', "")
    assert read(tmp_path, fine).targets["u"] == {"model": "timm:y", "num_classes": 3}
    with pytest.raises(ValueError, match="config: attacks: given in lines 6 and 7"):
        read(tmp_path, fine + "attacks: {bim: {name: bim}}\n")


def test_anchors_and_merged_keys_are_taken_as_yaml_has_them(tmp_path: Path) -> None:
    text = """\
data: photos
sources: {a: "timm:x"}
targets: {t: "timm:x"}
attacks:
  mi: &usual {name: mifgsm, eps: 4/255, steps: 20}
  di: {<<: *usual, name: difgsm}
"""
    assert read(tmp_path, text).attacks["di"] == {"name": "difgsm", "eps": 4 / 255, "steps": 20}
    with pytest.raises(ValueError, match=r"matrix\.yaml"):
        read(tmp_path, "&a [*a]\n")
