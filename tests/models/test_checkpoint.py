import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from alignfast.models import Classifier, checkpoint, fingerprint, load_checkpoint, save_checkpoint
from tests import cases

PICKLED = [".pt", ".pth", ".th"]


def net(seed=0, classes=4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, classes))
    model[1].running_mean.normal_()
    return model.eval()


def classifier(seed=0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)):
    return Classifier(net(seed), mean, std, 4)


def write(path, state):
    save_file(state, path) if Path(path).suffix == ".safetensors" else torch.save(state, path)
    return path


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".safetensors", *PICKLED])
def test_every_kind_of_file_is_read(tmp_path, suffix, prefix, wrapped):
    path = write(tmp_path / f"weights{suffix}", prefixed(prefix, net(1).state_dict()))
    model = classifier() if wrapped else net()
    load_checkpoint(model, path)
    assert same(model.module if wrapped else model, net(1))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_wrapper_is_opened(tmp_path, wrapper, legacy):
    content = {"epoch": 3, "best": 0.5, wrapper: prefixed("module.", net(1).state_dict()), "optimizer": {"lr": 1}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    model = net()
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, net(1))


def test_a_counter_that_old_files_lack_is_kept(tmp_path):
    state = {k: v for k, v in net(1).state_dict().items() if not k.endswith("num_batches_tracked")}
    model = net()
    model[1].num_batches_tracked += 7
    load_checkpoint(model, write(tmp_path / "a.pt", state))
    assert int(model[1].num_batches_tracked) == 7
    assert torch.equal(model[3].weight, net(1)[3].weight)


def test_weights_are_cast_to_the_models_dtype(tmp_path):
    model = net()
    load_checkpoint(model, write(tmp_path / "a.pt", net(1).half().state_dict()))
    assert model[3].weight.dtype == torch.float32
    torch.testing.assert_close(model[3].weight, net(1)[3].weight, rtol=1e-3, atol=1e-4)


def without(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


def with_shape(name, *shape):
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("3.bias"), r"does not fit the model: missing keys 3\.bias$"),
        (
            without("3.bias", "3.weight", "0.bias", "0.weight"),
            r"missing keys 0\.weight, 0\.bias, 3\.weight and 1 more$",
        ),
        (lambda state: {**state, "extra": torch.zeros(1)}, r"unexpected keys extra$"),
        (
            lambda state: {**state, **{f"e{i}": torch.zeros(1) for i in range(9)}},
            r"unexpected keys e0, e1, e2 and 6 more$",
        ),
        (with_shape("3.bias", 5), r"other shapes 3\.bias \[5\] instead of \[4\]$"),
        (
            lambda state: {"4.bias": torch.zeros(1), **with_shape("0.bias", 9)(without("3.bias")(state))},
            r"missing keys 3\.bias; unexpected keys 4\.bias; other shapes 0\.bias \[9\] instead of \[2\]$",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path, suffix, change, message):
    path = write(tmp_path / f"a{suffix}", change(net(1).state_dict()))
    model = net()
    with pytest.raises(ValueError, match=f"^checkpoint: {re.escape(str(path))} .*{message}"):
        load_checkpoint(model, path)
    assert same(model, net())


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", PICKLED)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, suffix, legacy):
    trace = tmp_path / "ran"
    content = {**net(1).state_dict(), "evil": Evil(f"touch {trace}")}
    torch.save(content, tmp_path / f"a{suffix}", _use_new_zipfile_serialization=not legacy)
    model = net()
    with pytest.raises(ValueError, match=r"^checkpoint: .* cannot be read as weights alone"):
        load_checkpoint(model, tmp_path / f"a{suffix}")
    assert not trace.exists()
    assert same(model, net())


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(net(1), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_checkpoint(net(), tmp_path / "a.pt")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".legacy.pt"])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    if suffix == ".legacy.pt":
        torch.save(net(1).state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        write(path, net(1).state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    model = net()
    with pytest.raises(ValueError, match=r"^checkpoint: .* cannot be read as weights alone: ."):
        load_checkpoint(model, path)
    assert same(model, net())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), suffix=st.sampled_from([".safetensors", ".pt"]), pickled=st.booleans())
def test_any_other_file_is_refused(tmp_path, data, suffix, pickled):
    path = tmp_path / f"a{suffix}"
    path.write_bytes((b"\x80\x02" if pickled else b"") + data)
    with pytest.raises(ValueError, match=r"^checkpoint: "):
        load_checkpoint(net(), path)


@pytest.mark.parametrize(
    "content", [{}, [torch.zeros(1)], torch.zeros(3), {"a": 1}, {0: torch.zeros(1)}, {"state_dict": {"a": "b"}}]
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"^checkpoint: .* holds no tensors by name"):
        load_checkpoint(net(), tmp_path / "a.pt")


def test_wrong_suffixes_and_missing_files(tmp_path):
    for name in ("a.bin", "a", "a.pt.tmp"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=r"^checkpoint: got .*; allowed suffixes are .safetensors, .pt, .pth, .th"):
            load_checkpoint(net(), tmp_path / name)
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"^checkpoint: .*{name} does not exist"):
            load_checkpoint(net(), tmp_path / name)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(net(), tmp_path / "folder.pt")


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.module = inner


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        self.view = nn.Parameter(torch.randn(6, 4).t())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("none", torch.zeros(0, 2))


@pytest.mark.parametrize(
    "build",
    [
        net,
        classifier,
        Tied,
        lambda: Wrapper(net()),
        lambda: Classifier(nn.DataParallel(net())),
        lambda: Wrapper(Wrapper(net())),
        lambda: net().bfloat16(),
    ],
)
def test_what_is_saved_comes_back(tmp_path, build):
    saved, model = build(), build()
    with torch.no_grad():
        for weight in saved.parameters():
            weight.normal_()
    save_checkpoint(saved, tmp_path / "a.safetensors", {"epoch": "3"})
    assert not same(saved, model)
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert same(saved, model)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_checkpoint_of_a_classifier_is_that_of_its_module(tmp_path):
    save_checkpoint(classifier(1), tmp_path / "a.safetensors")
    model = net()
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert same(model, net(1))


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a", "a.bin"])
def test_only_safetensors_are_written(tmp_path, name):
    with pytest.raises(ValueError, match=r"^checkpoint: got .*; allowed is a name that ends in .safetensors"):
        save_checkpoint(net(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, error):
    save_checkpoint(net(1), tmp_path / "a.safetensors")

    def torn(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", torn)
    with pytest.raises(type(error)):
        save_checkpoint(net(2), tmp_path / "a.safetensors")
    with pytest.raises(type(error)):
        save_checkpoint(net(2), tmp_path / "b.safetensors")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    model = net()
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert same(model, net(1))


def test_the_fingerprint_depends_on_every_weight_and_on_nothing_else():
    base = fingerprint(classifier())
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert fingerprint(classifier()) == base
    assert fingerprint(classifier().train().requires_grad_(False)) == base
    assert fingerprint(classifier().to(memory_format=torch.channels_last)) == base
    seen = {base, fingerprint(net()), fingerprint(classifier(1)), fingerprint(classifier().double())}
    assert len(seen) == 4
    for name, tensor in classifier().state_dict().items():
        for element in (0, tensor.numel() - 1):
            model = classifier()
            values = model.state_dict()[name].view(-1)
            values[element] += 1 if tensor.dtype == torch.int64 else 1e-3
            seen.add(fingerprint(model))
    # The counter has one element, so both changes to it are the same.
    assert len(seen) == 4 + 2 * len(classifier().state_dict()) - 1


@pytest.mark.parametrize(
    "options",
    [{"mean": (0.5, 0.4, 0.31)}, {"std": (0.2, 0.3, 0.41)}, {"mean": (0.3, 0.4, 0.5)}, {"mean": None, "std": None}],
)
def test_the_fingerprint_depends_on_the_normalisation(options):
    assert fingerprint(classifier(**options)) != fingerprint(classifier())


@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.int64, torch.bool, torch.complex64])
def test_fingerprints_of_any_dtype(dtype):
    first, second = nn.Module(), nn.Module()
    first.register_buffer("a", torch.zeros(3, dtype=dtype))
    second.register_buffer("a", torch.tensor([0, 0, 1]).to(dtype))
    assert fingerprint(first) != fingerprint(second)
    reshaped = nn.Module()
    reshaped.register_buffer("a", torch.zeros(3, 1, dtype=dtype))
    assert fingerprint(first) != fingerprint(reshaped)
