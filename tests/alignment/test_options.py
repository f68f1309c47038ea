"""What the settings of an alignment do, each against plain PyTorch or what it should leave unchanged."""

from __future__ import annotations

import copy
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, softmax

from alignfast.alignment import AlignConfig, AlignResult, align
from alignfast.alignment.embeddings import EMBEDDINGS, RKD, EmbeddingLoss, Hint
from alignfast.alignment.logs import JsonLines, TensorBoard
from alignfast.alignment.outputs import OUTPUT_LOSSES, OutputLoss, output_loss
from alignfast.attacks import PGD
from alignfast.models import Classifier, Ensemble
from tests.alignment.test_align import BATCH, CLASSES, STEPS, batches, classifier, config_of, distance


def run(config: AlignConfig, data: Any = None, source: Classifier | None = None, **options: Any) -> AlignResult:
    return align(source or classifier(0), classifier(11), data or batches(), config, **options)


def test_accumulated_batches_are_one_large_batch() -> None:
    """With statistics frozen, of batches of unequal sizes, and with a last step of fewer batches."""
    parts = batches(5)
    parts[1] = (parts[1][0][:2], parts[1][1][:2])
    whole = [tuple(torch.cat(both) for both in zip(*parts[at : at + 2], strict=True)) for at in (0, 2)] + [parts[4]]
    config = config_of(batch_norm="freeze", lambda_cls=0.5)
    together = run(config, whole)
    apart = run(config_of(batch_norm="freeze", lambda_cls=0.5, accumulate=2), parts)
    assert len(apart.history) == len(together.history) == 3
    assert distance(apart.model, together.model) < 1e-6
    for one, other in zip(apart.history, together.history, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert len(run(config_of(accumulate=2, steps=4), parts).history) == 4


def test_warm_up_rises_and_then_falls() -> None:
    rates = [entry["lr"] for entry in run(config_of(lr=0.1, warmup=4)).history]
    assert rates[:4] == pytest.approx([0.1 * (0.01 + 0.99 * step / 4) for step in range(4)])
    assert rates[4:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(16)])
    with pytest.raises(ValueError, match="warmup: got 20 of 20 steps; allowed are fewer"):
        run(config_of(warmup=20))


def test_an_average_of_the_weights_is_the_result() -> None:
    """Its parameters, with the statistics that the run ended with."""
    seen: list[dict[str, Tensor]] = []

    class Watching(list[Any]):
        def __iter__(self) -> Any:
            for batch in list.__iter__(self):
                seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
                yield batch

    model = classifier(0)
    plain = run(config_of(), source=classifier(0)).model
    result = run(config_of(ema=0.8), Watching(batches()), model, in_place=True)
    last = dict(plain.named_parameters())
    expected = copy.deepcopy(seen[1])
    for weights in [*seen[2:], last]:
        for name, value in weights.items():
            expected[name] = 0.8 * expected[name] + 0.2 * value
    for name, value in result.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    for name, buffer in result.model.named_buffers():
        assert torch.equal(buffer, dict(plain.named_buffers())[name]), name


def test_recalibrated_statistics_are_means_over_the_batches() -> None:
    result = run(config_of(batch_norm="recalibrate"))
    network = result.model.module
    mean, std = result.model.mean[:, None, None], result.model.std[:, None, None]  # type: ignore[index]
    outputs = [network[0]((images - mean) / std) for images, _ in batches()]  # type: ignore[index]
    expected = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(network[1].running_mean, expected, rtol=1e-4, atol=1e-5)  # type: ignore[index]
    moved = run(config_of()).model
    for (name, one), other in zip(result.model.named_parameters(), moved.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="batch_norm: got 'recalibrate' with an iterator"):
        run(config_of(batch_norm="recalibrate", steps=2), iter(batches()))


def test_synchronised_statistics_need_gpus() -> None:
    with pytest.raises(ValueError, match="batch_norm: got 'synchronise' on the CPU; allowed there is move"):
        run(config_of(batch_norm="synchronise"))


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_losses_between_probabilities(kind: Any) -> None:
    source, witness, (images, _) = classifier(0).train(), classifier(11).eval(), batches()[0]
    apart = softmax(source.logits(images) / 2, 1) - softmax(witness.logits(images) / 2, 1)
    expected = (apart.square().sum(1) if kind == "mse" else apart.abs().sum(1) / 2).mean()
    entry = run(config_of(loss=kind, temperature=2.0)).history[0]
    assert entry["kd"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_source_as_it_was_holds_it() -> None:
    held = run(config_of(lambda_self=20.0, lr=0.002, batch_norm="freeze"))
    free = run(config_of(lr=0.002, batch_norm="freeze"))
    images = torch.cat([images for images, _ in batches()])
    before = log_softmax(classifier(0).eval().logits(images), 1)
    gaps = [
        float(kl_div(log_softmax(result.model.logits(images), 1), before, log_target=True, reduction="batchmean"))
        for result in (held, free)
    ]
    assert gaps[0] < 0.5 * gaps[1]
    assert held.history[0]["self"] == pytest.approx(0, abs=1e-6)
    # In training mode the batch's own statistics set the source apart from what it was, even at the first step.
    moved = run(config_of(lambda_self=1.0))
    student = classifier(0).train().logits(batches()[0][0])
    expected = 16 * kl_div(
        log_softmax(student / 4, 1),
        softmax(classifier(0).eval().logits(batches()[0][0]) / 4, 1),
        reduction="batchmean",
    )
    assert moved.history[0]["self"] == pytest.approx(float(expected.detach()), rel=1e-3)


def test_losses_of_predictions_are_summed() -> None:
    outputs = (OutputLoss("mse", weight=10.0), OutputLoss("kl", "symmetric", 1.0, 0.5), OutputLoss("kl", "symmetric"))
    entry = run(config_of(outputs=outputs, temperature=2.0, combine="max")).history[0]
    student, images = classifier(0).train(), batches()[0][0]
    logits = student.logits(images).detach()
    taught = torch.stack([classifier(11).eval().logits(images).detach()])
    each = {
        "kd": output_loss(logits, taught, temperature=2.0),
        "mse": output_loss(logits, taught, kind="mse", temperature=2.0),
        "symmetric": output_loss(logits, taught, temperature=1.0, direction="symmetric"),
        "symmetric 2": output_loss(logits, taught, temperature=2.0, direction="symmetric"),
    }
    for name, wanted in each.items():
        assert entry[name] == pytest.approx(float(wanted), rel=1e-4), name
    weighted = each["kd"] + 10 * each["mse"] + 0.5 * each["symmetric"] + each["symmetric 2"]
    assert entry["loss"] == pytest.approx(float(weighted), rel=1e-4)


def test_a_loss_of_predictions_alone_is_the_first_of_that_kind() -> None:
    alone = run(config_of(lambda_kd=0.0, outputs=(OUTPUT_LOSSES["jsd"], OutputLoss("l1", weight=0.0))))
    wanted = run(config_of(direction="jsd"))
    assert all("l1" not in entry and entry["kd"] is None for entry in alone.history)
    assert [entry["loss"] for entry in alone.history] == [entry["loss"] for entry in wanted.history]
    with pytest.raises(ValueError, match="outputs: got 'jsd'"):
        config_of(outputs=("jsd",))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_losses_join_the_divergence(name: str) -> None:
    loss = EMBEDDINGS[name]
    entry = run(config_of(embeddings=(loss,), lambda_cls=0.1, lr=1e-3)).history[0]
    key = type(loss).__name__.lower()
    wanted = entry["kd"] + loss.weight * entry[key] + 0.1 * entry["cls"]
    assert entry["loss"] == pytest.approx(wanted, rel=1e-4)
    assert entry[key] > 0


def test_embedding_losses_alone() -> None:
    both = run(config_of(embeddings=(RKD(weight=0.3),), steps=1)).history[0]
    alone = run(config_of(embeddings=(RKD(weight=0.3),), lambda_kd=0.0, steps=1)).history[0]
    assert alone["kd"] is None
    assert alone["rkd"] == both["rkd"]
    assert alone["loss"] == pytest.approx(0.3 * alone["rkd"], rel=1e-6)
    with pytest.raises(ValueError, match="got 0 for all"):
        config_of(embeddings=(RKD(weight=0.0),), lambda_kd=0.0)


def test_an_embedding_loss_by_hand() -> None:
    """Of two witnesses, one of which is wider, so that a projection leads there."""
    source, images = classifier(0), batches()[0][0]
    witnesses = [classifier(11), classifier(12, width=9)]
    losses: tuple[EmbeddingLoss, ...] = (RKD(weight=0.3), Hint(weight=0.2))
    history = align(source, witnesses, batches(), config_of(embeddings=losses)).history
    mine = embedding(source.train(), images)
    theirs = [embedding(witness.eval(), images) for witness in witnesses]
    relational = torch.stack([RKD().loss(mine, other, None) for other in theirs]).mean()
    assert history[0]["rkd"] == pytest.approx(float(relational), rel=1e-4)
    assert history[0]["hint"] > 0
    assert history[0]["loss"] == pytest.approx(
        history[0]["kd"] + 0.3 * history[0]["rkd"] + 0.2 * history[0]["hint"], rel=1e-5
    )
    assert history[-1]["hint"] < 0.9 * history[0]["hint"]


def embedding(model: Classifier, images: Tensor) -> Tensor:
    assert model.mean is not None
    assert model.std is not None
    normal = (images - model.mean[:, None, None]) / model.std[:, None, None]
    return nn.Sequential(*list(model.module.children())[:5])(normal).detach()


def test_layers_for_embeddings_can_be_named() -> None:
    config = config_of(embeddings=(RKD(),), source_layer="2", witness_layer="0", steps=2)
    assert run(config).history[0]["rkd"] != run(config_of(embeddings=(RKD(),), steps=2)).history[0]["rkd"]
    with pytest.raises(ValueError, match="layer: got '9'"):
        run(config_of(embeddings=(RKD(),), source_layer="9"))


def test_perturbed_images_are_trained_on() -> None:
    perturb = partial(PGD, eps=0.1, alpha=0.04, steps=2, seed=3)
    history = run(config_of(batch_norm="freeze", lr=1e-9), perturb=perturb).history
    (images, labels), source, witness = batches()[0], classifier(0).eval(), classifier(11).eval()
    adv = PGD(source, eps=0.1, alpha=0.04, steps=2, seed=3)(images, labels)
    expected = 16 * kl_div(
        log_softmax(source.logits(adv) / 4, 1), softmax(witness.logits(adv) / 4, 1), reduction="batchmean"
    )
    assert history[0]["kd"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_held_out_images_measure_agreement_and_stop_early() -> None:
    held = batches(30)[STEPS:]
    result = run(config_of(check_every=5, lr=0.1), held_out=held)
    checked = [entry for entry in result.history if "gradient_cosine" in entry]
    assert [entry["step"] for entry in checked] == [5, 10, 15, 20]
    kd, cosine = held_out_by_hand(result.model, classifier(11), held)
    assert checked[-1]["held_out_kd"] == pytest.approx(kd, rel=1e-3)
    assert checked[-1]["gradient_cosine"] == pytest.approx(cosine, abs=1e-4)
    assert result.clean.n == 10 * BATCH
    assert result.clean.given
    with pytest.raises(ValueError, match="patience: got a number without held_out"):
        run(config_of(patience=1))


def test_the_best_weights_are_kept() -> None:
    held = batches(30)[STEPS:]
    # So large a rate that agreement falls.
    result = run(config_of(check_every=1, patience=3, lr=2.0, epochs=3), held_out=held)
    cosines = [entry["gradient_cosine"] for entry in result.history]
    best = max(range(len(cosines)), key=cosines.__getitem__)
    assert len(cosines) == best + 4 < 60
    found = held_out_by_hand(result.model, classifier(11), held)[1]
    assert found == pytest.approx(cosines[best], abs=1e-4)


def held_out_by_hand(model: Classifier, witness: Classifier, data: Any) -> tuple[float, float]:
    images, labels = (torch.cat(both) for both in zip(*data, strict=True))
    grads, logits = [], []
    for one in (model.eval(), witness.eval()):
        leaf = images.clone().requires_grad_()
        logits.append(one.logits(leaf))
        grads.append(torch.autograd.grad(cross_entropy(logits[-1], labels, reduction="sum"), leaf)[0].flatten(1))
    kd = 16 * kl_div(log_softmax(logits[0] / 4, 1), softmax(logits[1] / 4, 1), reduction="batchmean")
    return float(kd), float(cosine_similarity(*grads).mean())


def test_clean_accuracy_before_and_after() -> None:
    clean = [(torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(7)), torch.arange(40) % CLASSES)]
    result = run(config_of(lr=0.2), clean=clean)
    images, labels = clean[0]
    for model, found in ((classifier(0).eval(), result.clean.before), (result.model, result.clean.after)):
        assert found == pytest.approx(float((model(images).argmax(1) == labels).float().mean()))
    assert (result.clean.n, result.clean.given) == (40, True)
    trained = run(config_of()).clean
    assert (trained.n, trained.given) == (STEPS * BATCH, False)
    images, labels = (torch.cat(both) for both in zip(*batches(), strict=True))
    assert trained.before == pytest.approx(float((classifier(0).eval()(images).argmax(1) == labels).float().mean()))
    for options in ({"clean": clean}, {}):
        given = run(config_of(lr=0.2), **options).clean
        assert run(config_of(lr=0.2), in_place=True, **options).clean == given
        assert given.before != given.after


def test_no_copy_of_a_source_that_is_aligned_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless accuracy before is that on images that training reads."""
    source, copied = classifier(0), []
    plain = copy.deepcopy

    def deepcopy(what: Any, *memo: Any) -> Any:
        if what is source:
            copied.append(what)
        return plain(what, *memo)

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    run(config_of(steps=2), source=source, in_place=True, clean=batches(1))
    run(config_of(steps=2), source=source, in_place=True, held_out=batches(1))
    assert not copied
    run(config_of(steps=2), source=source, clean=batches(1))
    assert len(copied) == 1
    run(config_of(steps=2), source=source, in_place=True)
    assert len(copied) == 2


def test_nothing_is_counted_before_all_is_checked() -> None:
    source, calls = classifier(0), []
    source.module.register_forward_hook(lambda *_: calls.append(1))
    for data, message in (
        ([], "loader: holds no batch"),
        ([(torch.rand(2, 3, 8, 8) - 1, torch.zeros(2).long())], "span"),
    ):
        with pytest.raises(ValueError, match=message):
            align(source, classifier(11), data, config_of(), clean=batches(1))
    assert not calls


def test_every_step_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    result = run(config_of(), logs=[JsonLines(path)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == result.history


def test_scalars_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(config_of(), logs=[TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert [value for _, value in found] == pytest.approx([entry["loss"] for entry in result.history])
    assert len(events.Scalars("images/s")) == STEPS


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"tensorboard: not installed; pip install 'alignfast\[tensorboard\]'"
    ):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("changes", [{"channels_last": True}, {"compile": True}])
def test_faster_forms_are_the_same_run(changes: dict[str, Any]) -> None:
    source = classifier(0)
    expected, found = run(config_of()), run(config_of(**changes), source=source)
    assert distance(found.model, expected.model) < 1e-4
    assert found.model.memory_format == torch.contiguous_format
    assert source.module[0].weight.is_contiguous()  # type: ignore[union-attr]


def test_an_ensemble_as_a_witness_is_the_mean_of_its_members() -> None:
    members = [classifier(11), classifier(12)]
    history = align(classifier(0), Ensemble(members), batches(), config_of()).history
    images = batches()[0][0]
    taught = torch.stack([member.eval().logits(images) for member in members]).mean(0)
    student = classifier(0).train().logits(images)
    expected = 16 * kl_div(log_softmax(student / 4, 1), softmax(taught / 4, 1), reduction="batchmean")
    assert history[0]["kd"] == pytest.approx(float(expected.detach()), rel=1e-4)
