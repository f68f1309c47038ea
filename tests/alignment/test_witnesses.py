from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alignfast.alignment import cache as cache_module
from alignfast.alignment.cache import WitnessCache, witness_key
from alignfast.alignment.witnesses import Witnesses
from alignfast.models import Classifier, Ensemble, fit_size
from alignfast.ops import kl_div_with_logits
from alignfast.surrogates import Collection, LinearBackward, surrogate
from tests import cases

MEAN, STD, CLASSES = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 5
COUNT, SHAPE = 20, (2, CLASSES)


def witness(seed: int = 0, side: int = 8, classes: int = CLASSES) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: Any = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Flatten(),
            nn.Linear(6 * side * side, classes),
        )
        for norm in (layers[1], layers[4]):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    return Classifier(layers, MEAN, STD, classes, (3, side, side))


def images(count: int = 4, side: int = 8, seed: int = 1) -> Tensor:
    return cases.random((count, 3, side, side), seed, torch.float32)


def plain(models: list[Classifier], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([copy.deepcopy(one).eval().logits(fit_size(x, one)) for one in models])


def models() -> list[Classifier]:
    return [witness(0), witness(1, side=12), Ensemble([witness(2), witness(3)], "probabilities")]


@pytest.mark.parametrize("example", [None, images(2)])
def test_logits_are_those_of_the_witnesses(example: Tensor | None) -> None:
    given = models()
    witnesses = Witnesses(given, example=example)
    logits = witnesses.logits(images())
    wanted = plain(given, images())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    left = [part for one in witnesses.models for part in one.modules() if isinstance(part, _BatchNorm)]
    assert len(left) == (8 if example is None else 0)
    assert all(one.training and next(one.parameters()).requires_grad for one in given)
    assert len(witnesses) == 3


def test_networks_in_channels_last() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = {"resnet18": {}, "tf_efficientnet_lite0": {}, "vit_tiny_patch16_224": {"img_size": 64}}
        given = [
            Classifier(timm.create_model(name, num_classes=7, **options), MEAN, STD, 7, (3, 64, 64))
            for name, options in names.items()
        ]
        for one in given:
            for part in one.modules():
                if isinstance(part, _BatchNorm):
                    part.running_var.uniform_(0.5, 1.5)
    x = images(2, 64)
    witnesses = Witnesses(given, example=x[:1])
    layouts = [one.memory_format for one in witnesses.models]
    assert layouts == [torch.channels_last, torch.channels_last, torch.contiguous_format]
    wanted = plain(given, x)
    scale = wanted.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(witnesses.logits(x) / scale, wanted / scale, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sequential. batch normalisation is not folded:RuntimeWarning")
@pytest.mark.parametrize("sets", [1, 2])
def test_weights_beside_the_module_are_used_as_they_are(sets: int) -> None:
    one = witness().eval()
    stacks = {name: torch.stack([value] * sets) for name, value in one.module.state_dict().items()}
    given: list[Classifier] = [Collection(one, stacks), surrogate(one, LinearBackward())]
    logits, wanted = Witnesses(given, example=images(1)).logits(images()), plain([one, one], images())
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(precision: Any, dtype: torch.dtype) -> None:
    given = models()
    witnesses = Witnesses(given, precision=precision, example=images(1))
    assert {parameter.dtype for one in witnesses.models for parameter in one.parameters()} == {dtype}
    logits, wanted = witnesses.logits(images()), plain(given, images())
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, wanted)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_logits_serve_as_a_constant_and_autocast_changes_nothing() -> None:
    witnesses = Witnesses([witness(0), witness(1)], example=images(1))
    x = images().requires_grad_()
    logits = witnesses.logits(x)
    assert not logits.requires_grad
    source = cases.normal((4, CLASSES), 3, torch.float32).requires_grad_()
    kl_div_with_logits(source, logits).backward()
    (source * logits).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(witnesses.logits(x), logits)
    with torch.inference_mode():
        assert torch.equal(witnesses.logits(images()), logits)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="models: got none"):
        Witnesses([])
    with pytest.raises(ValueError, match="precision: got 'fp8'"):
        Witnesses([witness()], precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"numbers of classes differ: \[5, 4\]"):
        Witnesses([witness(), witness(classes=4)]).logits(images())
    with (
        WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache,
        pytest.raises(ValueError, match="cache: is of 2 witnesses; allowed is one of 1"),
    ):
        Witnesses([witness()], cache=cache)


class Counting(Witnesses):
    passes = 0

    def _computed(self, images: Tensor) -> Tensor:
        self.passes += 1
        return super()._computed(images)


def test_rows_are_computed_once(tmp_path: Path) -> None:
    given, x = [witness(0), witness(1)], images(COUNT)
    with WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache:
        witnesses = Counting(given, cache=cache)
        wanted = witnesses.logits(x)
        first = witnesses.logits(x[:8], torch.arange(8))
        assert torch.equal(first, plain_rows(witnesses, x[:8]))
        assert first.is_contiguous()
        mixed = torch.tensor([7, 9, 3, 9])
        partly = witnesses.logits(x[mixed], mixed)
        # What is there keeps its bits, though another batch may round otherwise.
        assert torch.equal(partly[:, [0, 2]], first[:, [7, 3]])
        assert torch.equal(partly[:, 1], partly[:, 3])
        passes = witnesses.passes
        again = torch.tensor([9, 0, 7])
        torch.testing.assert_close(witnesses.logits(x[again], again), wanted[:, again])
        assert witnesses.passes == passes
        assert len(cache) == 9
    with WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache:
        assert len(cache) == 9
        later = Counting(given, cache=cache)
        assert torch.equal(later.logits(x[:8], torch.arange(8)), first)
        assert later.passes == 0
        with pytest.raises(KeyError, match="12"):
            cache.read(torch.tensor([0, 12]))


def plain_rows(witnesses: Witnesses, x: Tensor) -> Tensor:
    return torch.stack([one.logits(x) for one in witnesses.models]).detach()


def rows_of(indices: Tensor) -> Tensor:
    """Logits by which a row is known."""
    return (indices[None, :, None] * 10.0 + torch.arange(CLASSES) + torch.tensor([[[0.0]], [[5.0]]])).float()


WRITER = """
import sys, torch
from alignfast.alignment import cache
cache.ROWS_BETWEEN_FLUSHES = 6
held = cache.WitnessCache(sys.argv[1], "k", 20, (2, 5))
for start in (0, 4, 8):
    indices = torch.arange(start, start + 4)
    held.store(indices, indices[None, :, None].expand(2, 4, 5).float())
print("stored", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_leaves_what_reached_the_disk(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == "stored"
        with pytest.raises(ValueError, match=r"cache: .*witnesses-0.lock is held by another process"):
            WitnessCache(tmp_path, "k", COUNT, SHAPE)
        WitnessCache(tmp_path, "k", COUNT, SHAPE, rank=1).close()
        writer.send_signal(signal.SIGKILL)
    with WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache:
        there = torch.arange(8)
        # The last four were not waited for.
        assert len(cache) == 8
        assert torch.equal(cache.read(there)[1, :, 0], there.float())


def test_rows_are_marked_only_when_they_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WitnessCache(tmp_path, "k", COUNT, SHAPE)
    indices = torch.arange(4)
    cache.store(indices, rows_of(indices))
    assert cache.has(indices)
    marks = tmp_path / "witnesses-0.rows"
    assert not any(marks.read_bytes())

    def killed() -> None:
        raise KeyboardInterrupt

    flush = cache._rows.flush
    monkeypatch.setattr(cache._rows, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.flush()
    assert not any(marks.read_bytes())
    monkeypatch.setattr(cache._rows, "flush", flush)
    cache.close()
    assert sum(marks.read_bytes()) == 4
    with pytest.raises(ValueError, match="cache: is closed"):
        cache.has(indices)


@pytest.mark.parametrize("stage", ["_allocate", "write_json"])
def test_a_cache_whose_making_was_cut_off_is_made_anew(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            WitnessCache(tmp_path, "k", COUNT, SHAPE)
    with WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache:
        assert len(cache) == 0
        assert not cache.has(torch.tensor([0]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "logits": lambda folder: cut(folder / "witnesses-0.logits"),
    "rows": lambda folder: cut(folder / "witnesses-0.rows"),
    "bytes": lambda folder: (folder / "witnesses-0.rows").write_bytes(b"\x07" * COUNT),
    "missing": lambda folder: (folder / "witnesses-0.logits").unlink(),
    "json": lambda folder: (folder / "witnesses-0.json").write_text("{"),
    "list": lambda folder: (folder / "witnesses-0.json").write_text("[]"),
}
TORN = {
    "logits": "witnesses-0.logits is torn, with 799 bytes instead of 800",
    "rows": "witnesses-0.rows is torn, with 19 bytes instead of 20",
    "bytes": "witnesses-0.rows is torn, it holds other bytes",
    "missing": "witnesses-0.logits is missing",
    "json": "witnesses-0.json is torn",
    "list": "witnesses-0.json is torn",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_torn_files_are_refused(damage: str, tmp_path: Path) -> None:
    WitnessCache(tmp_path, "k", COUNT, SHAPE).close()
    DAMAGE[damage](tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=TORN[damage]):
            WitnessCache(tmp_path, "k", COUNT, SHAPE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("other", COUNT, SHAPE), "key k instead of other;"),
        (("k", 21, SHAPE), "count 20 instead of 21;"),
        (("k", COUNT, (2, 6)), r"shape \[2, 5\] instead of \[2, 6\];"),
        (("l", COUNT, (1, 5)), r"key k instead of l, shape \[2, 5\] instead of \[1, 5\];"),
    ],
)
def test_another_cache_is_refused(arguments: Any, told: str, tmp_path: Path) -> None:
    with WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache:
        cache.store(torch.tensor([3]), rows_of(torch.tensor([3])))
    with pytest.raises(ValueError, match=f"describes another one: {told} give another folder"):
        WitnessCache(tmp_path, *arguments)
    with WitnessCache(tmp_path, "k", COUNT, SHAPE) as cache:
        assert len(cache) == 1
    assert json.loads((tmp_path / "witnesses-0.json").read_text()) == {"key": "k", "count": 20, "shape": [2, 5]}


def test_bad_folders_indices_and_logits(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache: cannot write to"):
        WitnessCache(tmp_path / "file", "k", COUNT, SHAPE)
    with WitnessCache(tmp_path / "new" / "folder", "k", COUNT, SHAPE) as cache:
        for bad in ([-1, 0], [20]):
            with pytest.raises(ValueError, match=r"indices: values span .*; allowed is \[0, 19\]"):
                cache.has(torch.tensor(bad))
        with pytest.raises(ValueError, match=r"logits: got shape \[2, 1, 4\]; allowed is \[2, 1, 5\]"):
            cache.store(torch.tensor([0]), torch.zeros(2, 1, 4))
        none = torch.empty(0, dtype=torch.int64)
        cache.store(none, torch.empty(2, 0, 5))
        assert cache.has(none)
        assert cache.read(none).shape == (2, 0, 5)


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="No space left on device"):
        WitnessCache(tmp_path, "k", COUNT, SHAPE)


def test_the_key_changes_with_everything_that_changes_logits() -> None:
    one, other = witness(0), witness(1)
    resized = copy.deepcopy(one)
    resized.input_size = (3, 9, 9)
    keys = [
        witness_key([one, other], "data", 0, "fp32"),
        witness_key([other, one], "data", 0, "fp32"),
        witness_key([one], "data", 0, "fp32"),
        witness_key([resized, other], "data", 0, "fp32"),
        witness_key([one, other], "other", 0, "fp32"),
        witness_key([one, other], "data", 1, "fp32"),
        witness_key([one, other], "data", 0, "bf16"),
    ]
    assert len(set(keys)) == len(keys)
    assert witness_key([copy.deepcopy(one).eval(), other], "data", 0, "fp32") == keys[0]
