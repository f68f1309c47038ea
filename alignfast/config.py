"""What a matrix file may say, and what numbers may look like where a person types them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import yaml

from alignfast.attacks import names_of, parameters_of
from alignfast.checks import check_choice, check_count, check_known, check_number
from alignfast.evaluation.kept import check_files
from alignfast.models import DEFENCES, Classifier, Defence, Defended, Ensemble, load_model
from alignfast.models.ensemble import Combine
from alignfast.models.preparation import Precision

MODEL_KEYS = ("model", "checkpoint", "pretrained", "weights", "num_classes", "input_size")
ENSEMBLE_KEYS = ("ensemble", "combine")
DEFENDED = "defences"
ALL = "all"
NEEDED = ("data", "sources", "targets", "attacks")
# Images to mix in, where an attack mixes and is not told how many.
POOL = 32


@dataclass(frozen=True)
class MatrixConfig:
    """A transfer matrix as a YAML file describes it.

    data: what `load_dataset` reads. sources, targets: "SPEC", a mapping with the arguments of `load_model` (`model`
    for the name; pretrained unless a checkpoint is given), or {ensemble: [models], combine: ...}; a target's mapping
    may list `defences` by name. attacks: mappings with a name and parameters, where numbers may be fractions such as
    4/255. budgets: radii; every attack is then run at each of them. defences: by name, a mapping or a list of those.
    defend: the defences of targets that list none, or "all". precision: in which sources are prepared to be attacked;
    targets are measured as they were loaded. limit: use so many images, spread evenly over the data set.

    As `read` gives it, attacks are those that are run: of the attack mi and the budget 4/255, the one named "mi 4/255".
    """

    data: str
    sources: Mapping[str, Any]
    targets: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]]
    budgets: tuple[str | float, ...] = ()
    defences: Mapping[str, Any] = field(default_factory=dict)
    defend: str | tuple[str, ...] = ()
    qualified: bool = False
    baseline: str | None = None
    precision: Precision = "fp32"
    batch_size: int = 16
    limit: int | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> MatrixConfig:
        """FileNotFoundError for no such file; ValueError for keys that are unknown, missing or given twice, values of
        another kind or outside their range, and names that would share a file."""
        content = _mapping_in(Path(path))
        check_known("config", "key", content, cls.__dataclass_fields__)
        for key in NEEDED:
            if key not in content:
                raise ValueError(f"config: {path} has no {key}; data, sources, targets and attacks are needed")
        for key in ("sources", "targets", "attacks", *({"defences"} & content.keys())):
            if not isinstance(content[key], dict) or not content[key]:
                raise ValueError(f"config: {key} is {content[key]!r}; allowed is a mapping with at least one entry")
        attacks = {name: attack_spec(f"attacks.{name}", spec) for name, spec in content["attacks"].items()}
        content["attacks"] = _at_budgets(attacks, content.get("budgets", ()))
        for key in ("budgets", "defend"):
            if isinstance(content.get(key), list):
                content[key] = tuple(content[key])
        config = cls(**content)
        config._check()
        return config

    def defences_of(self, target: str) -> tuple[str, ...]:
        """The names of the defences with each of which a target is measured, besides without."""
        spec = self.targets[target]
        if isinstance(spec, dict) and DEFENDED in spec:
            return tuple(spec[DEFENDED])
        return tuple(self.defences) if self.defend == ALL else tuple(self.defend)

    def measured(self) -> list[str]:
        """The names of the targets, each before those of itself with a defence, as in "vgg" and "vgg + jpeg75"."""
        return [name for target in self.targets for name in (target, *_defended(target, self.defences_of(target)))]

    def build_targets(self) -> dict[str, Classifier]:
        """The targets by those names; a target and its defended forms share their weights."""
        built: dict[str, Classifier] = {}
        for target, spec in self.targets.items():
            plain = {key: value for key, value in spec.items() if key != DEFENDED} if isinstance(spec, dict) else spec
            built[target] = build_model(plain)
            for name, defence in _defended(target, self.defences_of(target)).items():
                built[name] = Defended(built[target], defences_in(f"defences.{defence}", self.defences[defence]))
        return built

    def _check(self) -> None:
        for name, spec in self.sources.items():
            check_model(f"sources.{name}", spec)
        for name, spec in self.targets.items():
            check_model(f"targets.{name}", spec, (DEFENDED,))
        for name, spec in self.defences.items():
            defences_in(f"defences.{name}", spec)
        self._check_defended()
        check_files("sources", list(self.sources))
        check_files("targets", self.measured())
        check_files("attacks", list(self.attacks))
        if self.baseline is not None:
            check_choice("config: baseline", self.baseline, self.sources)
        if not isinstance(self.qualified, bool):
            raise ValueError(f"config: qualified: got {self.qualified!r}; allowed is true or false")
        check_choice("config: precision", self.precision, get_args(Precision))
        check_count("config: batch_size", self.batch_size)
        if self.limit is not None:
            check_count("config: limit", self.limit)

    def _check_defended(self) -> None:
        if isinstance(self.defend, str):
            check_choice("config: defend", self.defend, (ALL,))
        else:
            _check_listed("config: defend", self.defend, self.defences)
        for name, spec in self.targets.items():
            if isinstance(spec, dict) and DEFENDED in spec:
                _check_listed(f"targets.{name}.{DEFENDED}", spec[DEFENDED], self.defences)
        idle = set(self.defences) - {defence for target in self.targets for defence in self.defences_of(target)}
        if idle:
            raise ValueError(
                f"config: defences: no target has {sorted(idle, key=str)[0]}; list it under the defences of a target, "
                "or say defend: all"
            )


def _defended(target: str, defences: tuple[str, ...]) -> dict[str, str]:
    """The names of a target with each of its defences."""
    return {f"{target} + {defence}": defence for defence in defences}


def _check_listed(where: str, names: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"{where}: got {names!r}; allowed is a list of names from defences")
    if names and not known:
        raise ValueError(f"{where}: got {names[0]!r}, and there are no defences; allowed are names from defences")
    for name in names:
        check_choice(where, name, known)
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: got {', '.join(names)}; allowed is each once")


def _mapping_in(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        _check_once(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds {type(content).__name__}; allowed is a mapping")
    return content


def _check_once(root: Any) -> None:
    """Refuse a key that is given twice in one mapping, of which YAML would silently keep the last."""
    for node in _nodes(root, set()):
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise ValueError(f"config: {key.value}: given in lines {lines[name]} and {line}; allowed is once")
            lines[name] = line


def _nodes(node: Any, seen: set[int]) -> Iterator[Any]:
    # An anchor leads to the same node from several places, and may lead to itself.
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    yield node
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for part in pair:
                yield from _nodes(part, seen)
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _nodes(part, seen)


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


def _at_budgets(attacks: dict[str, dict[str, Any]], budgets: Any) -> dict[str, dict[str, Any]]:
    """Every attack at every budget, under both names; the attacks themselves where there are no budgets."""
    if isinstance(budgets, tuple):
        return attacks
    if not isinstance(budgets, list) or not budgets:
        raise ValueError(f"config: budgets is {budgets!r}; allowed is a list of at least one radius such as 4/255")
    radii = {text: _radius(f"config: budgets[{place}]", text) for place, text in enumerate(budgets)}
    if len(set(radii.values())) < len(budgets):
        raise ValueError(f"config: budgets: got {', '.join(map(str, budgets))}; allowed is each radius once")
    return {
        f"{name} {text}": _at_radius(spec, radius) for name, spec in attacks.items() for text, radius in radii.items()
    }


def _radius(where: str, value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{where}: got {value!r}; allowed is a number or a fraction such as 4/255")
    try:
        radius = number(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return check_number(where, radius, low=0.0, open_low=True)


def _at_radius(spec: Mapping[str, Any], radius: float) -> dict[str, Any]:
    """An attack with another eps, and an alpha that has the same part in it."""
    usual = parameters_of(spec["name"])
    eps, alpha = (spec.get(key, usual.get(key)) for key in ("eps", "alpha"))
    # What is no number is refused with the attack, and without alpha there is nothing to keep.
    if not all(isinstance(value, (int, float)) and value > 0 for value in (eps, alpha)):
        return {**spec, "eps": radius}
    return {**spec, "eps": radius, "alpha": radius * (alpha / eps)}


def defences_in(where: str, spec: Any) -> tuple[Defence, ...]:
    """{name: jpeg, quality: 75}, or a list of such mappings, as defences in this order.

    Raises:
        ValueError: an unknown name or key (with the nearest one), a value outside its range, or no defence; the message
            begins with `where`.
    """
    if isinstance(spec, list) and spec:
        return tuple(_defence(f"{where}[{place}]", part) for place, part in enumerate(spec))
    return (_defence(where, spec),)


def _defence(where: str, spec: Any) -> Defence:
    if not isinstance(spec, dict) or "name" not in spec:
        raise ValueError(f"{where}: got {spec!r}; allowed is a mapping with the name of a defence, or a list of those")
    kind = DEFENCES[check_choice(f"{where}.name", spec["name"], DEFENCES)]
    usual = {name: parameter.default for name, parameter in signature(kind).parameters.items()}
    given = {key: value for key, value in spec.items() if key != "name"}
    check_known(where, "key", given, usual)
    try:
        return kind(**{key: typed(key, value, usual[key]) for key, value in given.items()})
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


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


def check_model(where: str, spec: Any, more: tuple[str, ...] = ()) -> None:
    """What a model entry looks like, without loading it. more: keys that it may have besides."""
    if isinstance(spec, str):
        return
    if not isinstance(spec, dict):
        raise ValueError(f"{where}: got {spec!r}; allowed is the name of a model or a mapping")
    if "ensemble" in spec:
        check_known(where, "key", spec, (*ENSEMBLE_KEYS, *more))
        if not isinstance(spec["ensemble"], list) or not spec["ensemble"]:
            raise ValueError(f"{where}.ensemble: got {spec['ensemble']!r}; allowed is a list of at least one model")
        for position, member in enumerate(spec["ensemble"]):
            check_model(f"{where}.ensemble[{position}]", member)
        check_choice(f"{where}.combine", spec.get("combine", "logits"), get_args(Combine))
        return
    check_known(where, "key", spec, (*MODEL_KEYS, *more))
    if "model" not in spec:
        raise ValueError(f"{where}: has no model; allowed keys are {', '.join((*MODEL_KEYS, *more))}")


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
