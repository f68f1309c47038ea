"""Whole attacks and alignments on a small network: their sides, and that what is wrong is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.attacks import create
from alignfast.bench import networks, runs
from alignfast.bench import run as runner
from alignfast.bench.peers import PEERS
from alignfast.bench.registry import Case, select
from alignfast.bench.runs import AlignmentRun, AttackRun
from alignfast.models import prepare

CPU = torch.device("cpu")
SHAPE = (2, 3, 32, 32)
NETWORK = "test_resnet"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers as small as these only wait for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # torchattacks draws from it.
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def attack(
    preset: str = "mifgsm",
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    peers: tuple[str, ...] = ("torchattacks",),
) -> AttackRun:
    return AttackRun(preset, NETWORK, steps, SHAPE, dtype, CPU, peers)


def rounded(model: Any, steps: float) -> Any:
    """Weights that are off by a share of their size."""
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + steps * torch.randn(parameter.shape, generator=noise)
    return model


def alignment(dtype: torch.dtype = torch.float32) -> AlignmentRun:
    return AlignmentRun(NETWORK, NETWORK, 3, SHAPE, dtype, CPU)


@pytest.mark.parametrize("preset", runs.ATTACKS)
def test_attacks_agree_with_their_peers(preset: str) -> None:
    pytest.importorskip("torchattacks")
    sides, fault = attack(preset).prepare(compiled=False)
    assert fault is None
    assert list(sides) == ["ours", "torchattacks", "model"]


@pytest.mark.parametrize("preset", ["pgd", "mifgsm"])
def test_attacks_agree_with_all_peers(preset: str) -> None:
    for package in PEERS:
        pytest.importorskip(package)
    sides, fault = attack(preset, peers=tuple(PEERS)).prepare(compiled=False)
    assert fault is None
    assert list(sides) == ["ours", *PEERS, "model"]


def test_a_peer_leaves_the_model_in_evaluation_mode() -> None:
    """torchattacks puts a model that it is given in training mode back into it, with all of its parts."""
    pytest.importorskip("torchattacks")
    run = attack()
    run.prepare(compiled=False)
    assert not any(module.training for module in run._model.modules())


@pytest.mark.filterwarnings("ignore:precision. cpu computes bf16 in software")
def test_attacks_in_bf16_are_near_those_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, fault = attack(dtype=torch.bfloat16).prepare(compiled=False)
    assert fault is None
    assert "torchattacks" in sides
    monkeypatch.setattr(runs, "TURNED_IN_BF16", 0.0)
    monkeypatch.setattr(runs, "OF_AUTOCAST", 0.0)
    _, fault = attack(dtype=torch.bfloat16).prepare(compiled=False)
    assert fault is not None
    assert "of the pixels differ from those of the model as loaded, allowed are 0%" in fault


@pytest.mark.filterwarnings("ignore:precision. cpu computes bf16 in software")
def test_an_unfaithful_model_in_bf16_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(model: Any, images: Tensor, precision: str) -> Any:
        made = prepare(model, images, precision)
        return rounded(made, 0.5) if precision == "bf16" else made

    monkeypatch.setattr(runs, "prepare", prepared)
    _, fault = attack(dtype=torch.bfloat16).prepare(compiled=False)
    assert fault is not None
    assert "of the pixels differ from those of the model as loaded, allowed are 10%" in fault


def test_as_many_signs_may_turn_as_rounding_turns() -> None:
    assert runs.turned_in_bf16(0.01) == 0.1
    assert runs.turned_in_bf16(0.2) == 0.25


@pytest.mark.parametrize(
    ("preset", "changed"),
    [
        ("mifgsm", {"decay": 0.5}),
        ("mifgsm", {"alpha": 1 / 255}),
        ("mifgsm", {"targeted": True}),
        ("sinifgsm", {"m": 4}),
        ("pgd", {"random_start": True}),
        ("difgsm", {"diversity_prob": 1.0}),
        ("vmifgsm", {"beta": 1.5}),
    ],
)
def test_another_attack_is_noticed(preset: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchattacks")
    monkeypatch.setattr(runs, "create", lambda *arguments, **given: create(*arguments, **given | changed))
    _, fault = attack(preset).prepare(compiled=False)
    assert fault is not None
    assert fault.startswith("ours: ")
    assert "of the pixels differ from torchattacks'" in fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda images, adv: images + 1.1 * (adv - images), "outside the eps ball or [0, 1] by"),
        (lambda images, adv: adv - 1, "outside the eps ball or [0, 1] by"),
        (lambda images, adv: images, "moves pixels by 0, needed is"),
        (lambda images, adv: images + 0.4 * (adv - images), "moves pixels by"),
        (lambda images, adv: adv * float("nan"), "outside the eps ball or [0, 1] by nan"),
    ],
)
def test_results_are_in_the_ball_and_far_from_the_images(change: Callable[..., Tensor], fault: str) -> None:
    run = attack()
    adv = run._ours()(run._images, run._labels)
    assert run._constrained({"ours": adv, "torchattacks": adv}) is None
    found = run._constrained({"ours": change(run._images, adv), "torchattacks": adv})
    assert found is not None
    assert found.startswith(f"ours: {fault}")


def test_an_attack_that_stays_where_it_was_is_wrong_without_a_peer() -> None:
    run = attack()
    assert run._constrained({"ours": run._images}) == "ours: moves pixels by 0, needed is 0"


def test_without_peers_attacks_stand_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runs, runner):
        monkeypatch.setattr(module, "installed", lambda package: None)
    sides, fault = attack(peers=tuple(PEERS)).prepare(compiled=False)
    assert fault is None
    assert list(sides) == ["ours", "model"]
    skipped = runner.lacking(select(["attacks"], dtypes=["fp32"]), CPU)
    assert list(skipped) == list(PEERS)
    facts = {"gpu": {"name": "a GPU", "smi": None}, "chosen": "triton"}
    settings = runner.Settings("cuda", 1, 1.0, False)
    first, note, *_ = runner.notes(facts, settings, skipped)
    assert first.startswith("a GPU, driver unknown, backend of the ops: triton")
    assert note == "Skipped, not installed (pip install --no-deps torchattacks==3.5.1): torchattacks."
    assert runner.lacking(select(["ops"]), CPU) == {}


def test_passes_are_those_that_the_attack_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_BATCH", 4)
    batches: list[int] = []
    for preset, passes in {"pgd": [1, 1], "sinifgsm": [2, 2, 1] * 2, "vmifgsm": [1, 2, 2, 1, 1]}.items():
        run = attack(preset, steps=2)
        assert run.passes == passes
        assert len(run._labels) == 2
        batches.clear()
        bare = run._bare_passes()
        watched = run._prepared.module.register_forward_hook(lambda module, given, out: batches.append(len(out)))
        run._ours()(run._images, run._labels)
        ours = list(batches)
        batches.clear()
        bare()
        watched.remove()
        assert ours == batches == [2 * copies for copies in passes]


def test_on_cuda_there_is_a_side_without_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in: what is asked for is seen, and the graph of the bare passes is the passes themselves."""
    asked: list[dict[str, Any]] = []

    def made(name: str, source: Any, **parameters: Any) -> Any:
        asked.append(dict(parameters))
        parameters.pop("cuda_graph", None)
        return create(name, source, **parameters)

    run = attack()
    made_before = {name: getattr(run, name) for name in ("_model", "_prepared", "_images", "_labels")}
    on_gpu = replace(run, device=torch.device("cuda"), peers=())
    on_gpu.__dict__.update(made_before)
    monkeypatch.setattr(runs, "create", made)
    monkeypatch.setattr(runs, "captured", lambda call, device: (device.type, call))
    sides, fault = on_gpu.prepare(compiled=False)
    assert fault is None
    assert list(sides)[:2] == ["ours", "no graph"]
    assert sides["model"][0] == "cuda"
    assert [given.get("cuda_graph") for given in asked[:2]] == [None, False]


def test_bare_passes_are_captured_once_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Context:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            done.append(f"into {self.name}")

        def __exit__(self, *error: object) -> None:
            done.append(f"out of {self.name}")

        def wait_stream(self, other: object) -> None:
            done.append(f"{self.name} waits")

    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    cuda = {
        "Stream": lambda device: Context("side"),
        "current_stream": lambda device: Context("main"),
        "stream": lambda stream: stream,
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: Context("graph"),
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    networks.captured(lambda: done.append("passes"), torch.device("cuda"))()
    warm_up = ["side waits", "into side", "passes", "passes", "passes", "out of side", "main waits"]
    assert done == [*warm_up, "into graph", "passes", "out of graph", "replay"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_agrees_with_the_plain_loop(dtype: torch.dtype) -> None:
    run = alignment(dtype)
    sides, fault = run.prepare(compiled=False)
    assert fault is None
    more = ["authors"] if dtype == torch.bfloat16 else []
    assert list(sides) == ["ours", "plain", *more, "model"]
    before = [parameter.clone() for parameter in run._models[0].parameters()]
    for call in sides.values():
        call()
    assert all(torch.equal(a, b) for a, b in zip(before, run._models[0].parameters(), strict=True))
    assert not any(module.training for module in run._models[0].modules())


@pytest.mark.parametrize("change", [{"lambda_kd": 1.1}, {"lr": 0.1}, {"batch_norm": "freeze"}])
def test_another_alignment_is_noticed(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, fit = alignment(), runs.fit

    def changed(source: Any, witness: Any, batches: Any, config: runs.AlignConfig) -> Any:
        return fit(source, witness, batches, replace(config, **change))

    monkeypatch.setattr(runs, "fit", changed)
    _, fault = run.prepare(compiled=False)
    assert fault is not None
    assert fault.startswith("ours: losses are off the plain loop's by")


def test_tf32_is_as_it_was_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with networks.tf32(False):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_networks_are_the_same_every_time_and_leave_the_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (networks.classifier(NETWORK, (3, 32, 32), CPU, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    states = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_cases_build_runs() -> None:
    shape = (8, 3, 224, 224)
    case: Case = select(["attacks"], match="mifgsm/resnet50 2 steps/fp32")[0]
    assert case.name == "mifgsm/resnet50 2 steps/fp32/8x3x224x224"
    assert case.subject_on("cpu") == AttackRun("mifgsm", "resnet50", 2, shape, torch.float32, CPU, tuple(PEERS))
    align, *_ = select(["alignment"])
    assert align.subject_on("cpu") == AlignmentRun("resnet50", "resnet18", 2, shape, torch.float32, CPU)
