from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks import Attack, VarianceTuning, create, graph
from alignfast.models import Classifier, Ensemble, as_classifier
from tests.attacks.no_sync import NoSync
from tests.attacks.samples import CLASSES, GENERAL, UNSIGNED, Halving, Network, build, labels_of, made, photos
from tests.attacks.tape import Tape, Taping


@pytest.fixture
def taping(monkeypatch: pytest.MonkeyPatch) -> Taping:
    """Attacks on the CPU are recorded and replayed."""
    taping = Taping()
    monkeypatch.setitem(graph.CAPTURES, "cpu", taping)
    return taping


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of one shape, with other images, labels and indices."""
    images, labels = photos(6, dtype), labels_of(6)
    indices = torch.tensor([7, 0, 2**32 - 1, 12, 3, 5])
    return [(images[part], labels[part], indices[part]) for part in (slice(0, 2), slice(2, 4), slice(4, 6))]


def network() -> Network:
    torch.manual_seed(1)
    return Network().eval()


def ensemble(combine: Any) -> Ensemble:
    return Ensemble([network(), Classifier(network(), (0.5, 0.4), (0.2, 0.3))], combine)


@pytest.mark.parametrize("options", [{}, {"max_batch": 4, "seed": 2**63 + 5}], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_replays_are_the_plain_attack(name: str, options: dict[str, Any], taping: Taping) -> None:
    """To the bit, for batch after batch."""
    source = network().double()
    replayed, plain = made(name, source, **options), made(name, source, **options, cuda_graph=False)
    for images, labels, indices in [*batches(), batches()[0]]:
        expected = plain(images, labels, indices=indices)
        taped = replayed(images, labels, indices=indices)
        torch.testing.assert_close(taped, expected, rtol=0, atol=1e-12 if name in UNSIGNED else 0)
        assert not torch.equal(taped, images)
    # What an estimator keeps serves no step after the last, which is therefore recorded on its own.
    keeps = bool(taping.steps[0].args[1].estimator)
    assert keeps or not isinstance(replayed.estimator, VarianceTuning)
    assert len(taping.steps) == (2 if keeps else 1)
    assert len(taping.replays) == 4 * replayed.steps


@pytest.mark.parametrize(
    "source",
    [
        network(),
        Classifier(network(), (0.5, 0.4), (0.2, 0.3), CLASSES),
        *map(ensemble, ("logits", "probabilities", "losses")),
    ],
    ids=["bare", "normalised", "logits", "probabilities", "losses"],
)
@pytest.mark.parametrize("name", ["difgsm", "vnifgsm"])
def test_replays_through_any_source(name: str, source: nn.Module, taping: Taping) -> None:
    attack, plain = build(name, source, targeted=True), build(name, source, targeted=True, cuda_graph=False)
    for images, labels, _ in batches(torch.float32):
        assert torch.equal(attack(images, labels), plain(images, labels))


def test_a_tape_replays_what_was_done_and_nothing_else() -> None:
    """So that the tests above would see a number that was recorded instead of the place where it lies."""
    x, tape, calls = torch.tensor([1.0, 2.0]), Tape(), []
    with tape:
        calls.append("python")
        frozen = float(x[1].clone())
        y = (x[None] * x).sum(0)
        x.add_(y)
        z = x + frozen
    assert (x.tolist(), y.tolist(), z.tolist()) == ([2.0, 6.0], [1.0, 4.0], [4.0, 8.0])
    x.copy_(torch.tensor([3.0, 4.0]))
    tape.replay()
    assert (x.tolist(), y.tolist(), z.tolist()) == ([12.0, 20.0], [9.0, 16.0], [14.0, 22.0])
    assert calls == ["python"]


@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_buffers_stay_where_they_are(name: str, taping: Taping) -> None:
    attack, places = made(name, network().double()), set()
    for images, labels, indices in batches():
        adv = attack(images, labels, indices=indices)
        (state,) = {id(step.args[1]): step.args[1] for step in taping.steps}.values()
        places.add(tuple(tensor.data_ptr() for tensor in state.tensors()))
        assert torch.equal(state.adv, adv)
        assert torch.equal(state.images, images)
        assert int(state.number) == attack.steps
        assert adv.data_ptr() not in next(iter(places))
        assert images.data_ptr() not in next(iter(places))
    assert len(places) == 1
    assert len(next(iter(places))) == len(set(next(iter(places))))


@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_a_step_replaces_no_buffer(name: str) -> None:
    """Also in the plain loop, whose step it is."""
    source = Classifier(network().double(), num_classes=CLASSES)
    attack = made(name, source)
    state = attack._start_state(source, *batches()[0])
    places = [tensor.data_ptr() for tensor in state.tensors()]
    before = [tensor.clone() for tensor in (state.images, state.labels, state.indices)]
    for number in range(3):
        assert int(state.number) == number
        with NoSync("cpu"):
            attack._step(source, state, False)
        assert [tensor.data_ptr() for tensor in state.tensors()] == places
    for tensor, was in zip((state.images, state.labels, state.indices), before, strict=True):
        assert torch.equal(tensor, was)


def test_a_state_is_copied_whole() -> None:
    attack = made("everything", Halving())
    first, second = (attack._start_state(as_classifier(attack.source), *batch) for batch in batches()[:2])
    kept = first.clone()
    assert not {tensor.data_ptr() for tensor in kept.tensors()} & {tensor.data_ptr() for tensor in first.tensors()}
    for tensor in second.tensors():
        tensor.add_(1)
    kept.copy_(second)
    assert len(kept.tensors()) == 7
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(kept.tensors(), second.tensors(), strict=True))


def test_neighbours_of_the_last_step_are_left_out_of_a_replay_too(taping: Taping) -> None:
    model = Halving()
    attack = create("vmifgsm", model, steps=3, N=3)
    attack(*batches()[0][:2])
    # A warm-up and a recording of each of the two kinds of step.
    assert model.batches == [2, 6, 2, 6, 2, 2]
    assert taping.replays == [0, 0, 1]
    create("mifgsm", model, steps=3)(*batches()[0][:2])
    assert taping.replays == [0, 0, 1, 2, 2, 2]


def test_each_shape_has_a_graph_and_few_are_kept(taping: Taping) -> None:
    attack, images = build("mifgsm", Halving()), photos(6)

    def captures(images: Tensor) -> int:
        before = len(taping.steps)
        attack(images, labels_of(len(images)))
        return len(taping.steps) - before

    assert graph.MOST_KEPT == 4
    assert [captures(images[:count]) for count in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [captures(images[:count]) for count in (1, 2, 3, 4, 1)] == [0, 0, 0, 0, 0]
    # 2 is now the one that was not used for longest.
    assert captures(images[:5]) == 1
    assert [captures(images[:count]) for count in (1, 3, 4, 5)] == [0, 0, 0, 0]
    assert captures(images[:2]) == 1
    assert len(attack._graphs._kept) == 4


def test_dtype_and_layout_make_a_shape_of_their_own(taping: Taping) -> None:
    source = nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES))
    attack, plain = build("mifgsm", source), build("mifgsm", source, cuda_graph=False)
    images, labels = photos(2, torch.float32), labels_of(2)
    shapes = [images, images.to(memory_format=torch.channels_last), images[:1].expand(2, -1, -1, -1)]
    for count, given in enumerate(shapes, 1):
        for _ in range(2):
            adv, expected = attack(given, labels), plain(given, labels)
            assert torch.equal(adv, expected)
            assert adv.stride() == expected.stride()
        assert len(taping.steps) == count
    source.double()
    assert torch.equal(attack(images.double(), labels), plain(images.double(), labels))
    assert len(taping.steps) == 4


def test_weights_that_change_in_place_need_no_new_graph(taping: Taping) -> None:
    source = network()
    attack, plain = build("nifgsm", source), build("nifgsm", source, cuda_graph=False)
    images, labels, _ = batches(torch.float32)[0]
    first = attack(images, labels)
    with torch.no_grad():
        source.layers[0].weight.neg_()
        source.layers[1].running_mean.add_(0.3)
    second = attack(images, labels)
    assert torch.equal(second, plain(images, labels))
    assert not torch.equal(second, first)
    assert len(taping.steps) == 1


def replace_weight(source: Network) -> None:
    source.layers[0].weight = nn.Parameter(-source.layers[0].weight.detach())


def replace_data(source: Network) -> None:
    source.layers[0].weight.data = -source.layers[0].weight.data


def replace_buffer(source: Network) -> None:
    source.layers[1].running_var = source.layers[1].running_var * 4


def new_layout(source: Network) -> None:
    source.layers[0].weight.data = source.layers[0].weight.data.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [replace_weight, replace_data, replace_buffer, new_layout])
def test_a_replaced_tensor_of_the_model_makes_a_graph_stale(change: Callable[[Network], None], taping: Taping) -> None:
    source = network()
    attack, plain = build("nifgsm", source), build("nifgsm", source, cuda_graph=False)
    images, labels, _ = batches(torch.float32)[0]
    attack(images, labels)
    change(source)
    for _ in range(2):
        assert torch.equal(attack(images, labels), plain(images, labels))
    assert len(taping.steps) == 2
    assert len(attack._graphs._kept) == 1


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def matmul_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("settings", [lambda: torch.autocast("cpu"), deterministic, matmul_precision])
def test_settings_of_torch_are_recorded_too(settings: Callable[[], Any], taping: Taping) -> None:
    attack = build("bim", network())
    images, labels, _ = batches(torch.float32)[0]
    attack(images, labels)
    with settings():
        attack(images, labels)
        attack(images, labels)
    assert len(taping.steps) == 2


def test_graphs_are_optional(taping: Taping) -> None:
    images, labels, _ = batches()[0]
    for name in GENERAL:
        build(name, Halving(), cuda_graph=False)(images, labels)
    Attack(Halving(), 0.1, 0.1, 1, cuda_graph=False)(images, labels)
    assert taping.steps == []
    assert build("bim", Halving()).parameters()["cuda_graph"] is True
    assert build("bim", Halving(), cuda_graph=False).parameters()["cuda_graph"] is False


def test_the_cpu_has_no_graphs() -> None:
    assert list(graph.CAPTURES) == ["cuda"]
    attack = build("bim", Halving())
    attack(*batches()[0][:2])
    assert not attack._graphs._kept


def test_an_empty_batch_needs_no_graph(taping: Taping) -> None:
    assert build("bim", Halving())(photos(2)[:0], labels_of(0)).shape[0] == 0
    assert taping.steps == []


def test_copies_of_an_attack_have_graphs_of_their_own(taping: Taping) -> None:
    images, labels, _ = batches(torch.float32)[0]
    attack = build("vmifgsm", network())
    expected = attack(images, labels)
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert not other._graphs._kept
        assert torch.equal(other(images, labels), expected)
    assert "_graphs" not in attack.parameters()
    assert "_graphs" not in repr(attack)


def test_threads_take_turns(taping: Taping) -> None:
    source = network().double()
    attack, plain = build("vnifgsm", source), build("vnifgsm", source, cuda_graph=False)
    given = batches() * 4
    expected = [plain(images, labels, indices=indices) for images, labels, indices in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: attack(batch[0], batch[1], indices=batch[2]), given))
    assert all(torch.equal(adv, wanted) for adv, wanted in zip(found, expected, strict=True))


def test_modes_and_graphs_after_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RuntimeError("cuda_graph: no")

    monkeypatch.setitem(graph.CAPTURES, "cpu", refuse)
    model = network().train()
    attack = build("bim", model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cuda_graph: no"):
            attack(*batches(torch.float32)[0][:2])
        assert model.training
        assert not attack._graphs._kept


class Cuda:
    """What `capture_cuda` calls of torch.cuda, written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.now = self.default = FakeStream("current", 0, self.log)
        self.captures: list[dict[str, Any]] = []
        self.broken: Exception | None = None
        for name, stand_in in {
            "device": self.device,
            "Stream": lambda device: FakeStream("side", 1, self.log),
            "current_stream": lambda device=None: self.now,
            "stream": self.stream,
            "CUDAGraph": lambda: FakeGraph(self.log),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.random, "fork_rng", self.fork_rng)
        monkeypatch.setattr(graph, "_SHARING_POOL", copy.copy(graph._SHARING_POOL))
        graph._side_stream.cache_clear()

    def step(self) -> None:
        self.log.append(("step", self.now.name))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.log.append(("device", str(device)))
        yield

    @contextmanager
    def fork_rng(self, devices: list[torch.device]) -> Iterator[None]:
        self.log.append("fork")
        yield
        self.log.append("join")

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, recorded: FakeGraph, **options: Any) -> Iterator[None]:
        """Like torch's: leaves its stream current, and raises an error of its own, where something failed."""
        self.captures.append(options)
        self.log.append("begin")
        before, self.now = self.now, options["stream"]
        try:
            yield
        finally:
            self.log.append("end")
            if self.broken is not None:
                raise self.broken
            self.now = before


class FakeStream:
    def __init__(self, name: str, number: int, log: list[Any]) -> None:
        self.name, self.cuda_stream, self.log = name, number, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for", other.name))


class FakeGraph:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    yield Cuda(monkeypatch)
    graph._side_stream.cache_clear()


DEVICE = torch.device("cuda", 1)


def test_a_capture_warms_up_on_its_stream_first(cuda: Cuda) -> None:
    replay = graph.capture_cuda(cuda.step, DEVICE)
    assert cuda.log == [
        ("device", "cuda:1"),
        ("side", "waits for", "current"),
        "fork",
        *[("step", "side")] * graph.WARM_UPS,
        "join",
        ("current", "waits for", "side"),
        "begin",
        ("step", "side"),
        "end",
    ]
    assert cuda.now is cuda.default
    cuda.log.clear()
    replay()
    replay()
    assert cuda.log == ["replay", "replay"]


def test_graphs_of_one_stream_share_a_pool_while_one_of_them_lives(cuda: Cuda) -> None:
    first = graph.capture_cuda(cuda.step, DEVICE)
    second = graph.capture_cuda(cuda.step, DEVICE)
    assert [options["pool"] for options in cuda.captures] == [None, "pool"]
    assert cuda.captures[0]["stream"] is cuda.captures[1]["stream"]
    with cuda.stream(FakeStream("another", 7, cuda.log)):
        third = graph.capture_cuda(cuda.step, DEVICE)
    assert cuda.captures[2]["pool"] is None
    del first, second
    fourth = graph.capture_cuda(cuda.step, DEVICE)
    assert cuda.captures[3]["pool"] is None
    assert callable(third)
    assert callable(fourth)


def test_a_step_that_cannot_be_captured(cuda: Cuda) -> None:
    cuda.broken = RuntimeError("operation failed due to a previous error during capture")

    def waiting() -> None:
        cuda.step()
        if cuda.log[-2] == "begin":
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(RuntimeError, match="cuda_graph: the step") as raised:
        graph.capture_cuda(waiting, DEVICE)
    assert str(raised.value) == (
        "cuda_graph: the step cannot be captured in a CUDA graph (operation not permitted when stream is capturing); "
        "allowed is a model that neither waits for the device nor copies from the host, or cuda_graph=False"
    )
    assert raised.value.__cause__ is cuda.broken
    assert cuda.now is cuda.default
    cuda.broken = None
    graph.capture_cuda(cuda.step, DEVICE)
    assert cuda.captures[-1]["pool"] is None


def test_an_error_before_the_capture_is_the_models_own(cuda: Cuda) -> None:
    def failing() -> None:
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        graph.capture_cuda(failing, DEVICE)
    assert cuda.captures == []
    assert cuda.now is cuda.default


def test_a_capture_takes_no_weights_from_the_cache_of_autocast(cuda: Cuda) -> None:
    seen: list[tuple[bool, bool]] = []

    def step() -> None:
        seen.append((torch.is_autocast_enabled("cuda"), torch.is_autocast_cache_enabled()))

    graph.capture_cuda(step, DEVICE)
    assert torch.is_autocast_cache_enabled()
    assert set(seen) == {(False, False)}


def test_an_attack_is_captured_once_and_replayed_every_step(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a graph that does at a replay what was done at its capture."""
    steps: list[Callable[[], None]] = []

    def capture(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
        steps.append(step)
        replay = graph.capture_cuda(step, device)

        def replay_and_step() -> None:
            replay()
            step()

        return replay_and_step

    monkeypatch.setitem(graph.CAPTURES, "cpu", capture)
    attack = build("mifgsm", Halving())
    plain = build("mifgsm", Halving(), cuda_graph=False)
    for number, (images, labels, _) in enumerate(batches()):
        cuda.log.clear()
        assert torch.equal(attack(images, labels), plain(images, labels))
        assert cuda.log.count("replay") == attack.steps
        assert cuda.log.count("begin") == (1 if number == 0 else 0)
    assert len(steps) == 1
