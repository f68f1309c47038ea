"""What a matrix file may say, and what numbers may look like where a person types them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import yaml

from alignfast.attacks import names_of, parameters_of
from alignfast.checks import check_choice, check_known
from alignfast.models import Classifier, Ensemble, load_model
from alignfast.models.preparation import Precision

MODEL_KEYS = ("model", "checkpoint", "pretrained", "weights", "num_classes", "input_size")
ENSEMBLE_KEYS = ("ensemble", "combine")
# Images to mix in, where an attack mixes and is not told how many.
POOL = 32


@dataclass(frozen=True)
class MatrixConfig:
    """A transfer matrix as a YAML file describes it.

    data: what `load_dataset` reads. sources, targets: "SPEC", a mapping with the arguments of `load_model` (`model`
    for the name; pretrained unless a checkpoint is given), or {ensemble: [models], combine: ...}. attacks: mappings
    with a name and parameters, where numbers may be fractions such as 4/255. precision: in which sources are
    prepared to be attacked; targets are measured as they were loaded. limit: use so many images, spread evenly over
    the data set.
    """

    data: str
    sources: Mapping[str, Any]
    targets: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]]
    qualified: bool = False
    baseline: str | None = None
    precision: Precision = "fp32"
    batch_size: int = 16
    limit: int | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> MatrixConfig:
        """FileNotFoundError for no such file; ValueError for unknown or missing keys and values of another kind."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"config: no file {path}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"config: {path} holds {type(content).__name__}; allowed is a mapping")
        check_known("config", "key", content, cls.__dataclass_fields__)
        for key in ("data", "sources", "targets", "attacks"):
            if key not in content:
                raise ValueError(f"config: {path} has no {key}; data, sources, targets and attacks are needed")
        for key in ("sources", "targets", "attacks"):
            if not isinstance(content[key], dict) or not content[key]:
                raise ValueError(f"config: {key} is {content[key]!r}; allowed is a mapping with at least one entry")
        content["attacks"] = {name: attack_spec(f"attacks.{name}", spec) for name, spec in content["attacks"].items()}
        for role in ("sources", "targets"):
            for name, spec in content[role].items():
                check_model(f"{role}.{name}", spec)
        if "precision" in content:
            check_choice("config: precision", content["precision"], get_args(Precision))
        return cls(**content)


def number(text: str | float) -> float:
    """4/255, 0.1 or 1e-3 as a float; else ValueError."""
    try:
        return float(text) if isinstance(text, (int, float)) else float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, AttributeError):
        raise ValueError(f"got {text!r}; allowed is a number or a fraction such as 4/255") from None


def attack_spec(where: str, spec: Any) -> dict[str, Any]:
    """A mapping of an attack's name and parameters, with texts turned into what the parameters are.

    A pool of images to mix in is given by how many of the data set's it has.
    """
    if not isinstance(spec, dict) or "name" not in spec:
        raise ValueError(f"{where}: got {spec!r}; allowed is a mapping with the name of an attack")
    name = "+".join(names_of(str(spec["name"]), f"{where}.name"))
    allowed = parameters_of(name)
    given = {key: value for key, value in spec.items() if key != "name"}
    check_known(where, "key", given, allowed)
    usual = {"pool": POOL} if "pool" in allowed else {}
    return {"name": name} | usual | {key: typed(f"{where}.{key}", value, allowed[key]) for key, value in given.items()}


def typed(where: str, value: Any, default: Any) -> Any:
    """`value` as what `default` is, where a text can stand for that."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        return check_choice(where, value.lower(), ("true", "false")) == "true"
    if isinstance(default, (list, tuple)):
        return [typed(where, part.strip(), default[0]) for part in value.split(",")]
    try:
        return number(value) if isinstance(default, float) else int(value)
    except ValueError:
        # Without a default it may be a name, of which the attack knows more.
        if default is None:
            return value
        kind = "a number or a fraction such as 4/255" if isinstance(default, float) else "a whole number"
        raise ValueError(f"{where}: got {value!r}; allowed is {kind}") from None


def check_model(where: str, spec: Any) -> None:
    """What a model entry looks like, without loading it."""
    if isinstance(spec, str):
        return
    if not isinstance(spec, dict):
        raise ValueError(f"{where}: got {spec!r}; allowed is the name of a model or a mapping")
    if "ensemble" in spec:
        check_known(where, "key", spec, ENSEMBLE_KEYS)
        for position, member in enumerate(spec["ensemble"]):
            check_model(f"{where}.ensemble[{position}]", member)
        return
    check_known(where, "key", spec, MODEL_KEYS)
    if "model" not in spec:
        raise ValueError(f"{where}: has no model; allowed keys are {', '.join(MODEL_KEYS)}")


def build_model(spec: Any) -> Classifier:
    """The model of a checked entry: pretrained, unless a checkpoint or weights are given."""
    if isinstance(spec, str):
        return named_model(spec)
    if "ensemble" in spec:
        return Ensemble([build_model(member) for member in spec["ensemble"]], spec.get("combine", "logits"))
    options = {key: value for key, value in spec.items() if key != "model"}
    if "input_size" in options:
        options["input_size"] = tuple(options["input_size"])
    if not {"checkpoint", "weights"} & set(options):
        options.setdefault("pretrained", True)
    return load_model(spec["model"], **options)


def named_model(text: str, num_classes: int | None = None) -> Classifier:
    """SPEC or SPEC@CHECKPOINT, pretrained where there is no checkpoint."""
    spec, _, checkpoint = text.partition("@")
    return trained_model(spec, checkpoint or None, num_classes)


def trained_model(spec: str, checkpoint: str | os.PathLike[str] | None, num_classes: int | None) -> Classifier:
    """SPEC with the weights of a checkpoint, or else pretrained."""
    return load_model(spec, pretrained=checkpoint is None, checkpoint=checkpoint, num_classes=num_classes)
