from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.models.dataflow import Followed, changed_in_place, followed, has_hooks, paths_of
from tests import cases


class Net(nn.Module):
    """A layer and two followers, which `use` puts together."""

    def __init__(self, use: Callable[[Any, Tensor], Any], in_place: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.follower, self.other = nn.ReLU6(in_place), nn.ReLU6(in_place)
        self.same, self.change = nn.Identity(), nn.ELU(inplace=True)
        self.box = nn.Sequential(nn.Identity(), nn.Identity())
        self.use = use
        self.kept: Any = None

    def forward(self, rows: Tensor) -> Any:
        return self.use(self, rows)


def rows() -> Tensor:
    return cases.normal((1, 3, 4, 5), 1, torch.float32)


def is_layer(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv2d)


def is_follower(part: nn.Module) -> bool:
    return isinstance(part, nn.ReLU6)


def pairs(module: nn.Module, *, backwards: bool = False) -> list[tuple[str, str]]:
    """Names of layers and their followers. backwards: the rectifiers are the layers."""
    names = {part: name for name, part in module.named_modules()}
    found = found_in(module, backwards=backwards)
    return [(names[one.layer], names[one.follower]) for one in found if not one.shared]


def found_in(module: nn.Module, *, backwards: bool = False) -> list[Followed]:
    kinds = (is_follower, is_layer) if backwards else (is_layer, is_follower)
    return followed(module, lambda: module(rows()), *kinds)


def keeping(one: Any, rows: Tensor) -> Tensor:
    one.kept = one.layer(rows)
    result: Tensor = one.follower(one.kept)
    return result


def residual(one: Any, rows: Tensor) -> Tensor:
    out = one.layer(rows)
    both: Tensor = one.follower(out) + out
    return both


def read_before(one: Any, rows: Tensor) -> Tensor:
    out = one.layer(rows)
    both: Tensor = out.mean() + one.follower(out)
    return both


def beside(one: Any, rows: Tensor) -> Any:
    out = one.layer(rows)
    return one.follower(out), [out]


# Whether the follower follows, where it returns a tensor of its own and where it changes the one that it is given.
USES: dict[str, tuple[Callable[[Any, Tensor], Any], bool, bool]] = {
    "straight": (lambda one, rows: one.follower(one.layer(rows)), True, True),
    "through others": (lambda one, rows: one.follower(one.box(one.same(one.layer(rows)))), True, True),
    # What was changed in place is the follower's.
    "residual": (residual, False, True),
    "returned": (beside, False, True),
    "kept": (keeping, False, True),
    "read before": (read_before, False, False),
    "changed before": (lambda one, rows: one.follower(one.change(one.layer(rows))), False, False),
    "view": (lambda one, rows: one.follower(one.layer(rows)[:, :2]), False, False),
    "computed": (lambda one, rows: one.follower(one.layer(rows) * 1), False, False),
    "layer twice": (lambda one, rows: one.follower(one.layer(one.layer(rows))), False, False),
    "follower twice": (lambda one, rows: one.follower(one.follower(one.layer(rows))), False, False),
    "follower elsewhere": (lambda one, rows: one.follower(one.layer(one.follower(rows * 1))), False, False),
    "no follower": (lambda one, rows: one.layer(one.follower(rows * 1)), False, False),
    "not a tensor": (lambda one, rows: one.same((one.layer(rows), None))[0], False, False),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", USES)
def test_who_follows(name: str, in_place: bool) -> None:
    use, *follows = USES[name]
    assert pairs(Net(use, in_place)) == [("layer", "follower")] * follows[in_place]


def test_two_followers_of_one_tensor() -> None:
    def both(one: Any, rows: Tensor) -> Any:
        out = one.layer(rows)
        return one.follower(out), one.other(out)

    assert pairs(Net(both)) == []
    # The second is given what the first made of it.
    assert pairs(Net(both, in_place=True)) == [("layer", "follower")]


def test_a_layer_that_works_in_place() -> None:
    def use(one: Any, rows: Tensor) -> Any:
        return one.layer(one.follower(rows * 1))

    def again(one: Any, rows: Tensor) -> Any:
        out = rows * 1
        return one.layer(one.follower(out)) + out

    for in_place in (False, True):
        assert pairs(Net(use, in_place), backwards=True) == [("follower", "layer")]
        assert pairs(Net(again, in_place), backwards=True) == [("follower", "layer")] * (not in_place)


def a_part(one: Any, rows: Tensor) -> Any:
    out = rows * 1
    return one.layer(one.follower(out[:, :3])) + out


def a_view_of_it(one: Any, rows: Tensor) -> Any:
    out = rows * 1
    view = out[:, 1:]
    return one.layer(one.follower(input=out))[:, 1:] + view


@pytest.mark.parametrize("use", [a_part, a_view_of_it])
def test_views_of_what_a_layer_changes_in_place(use: Callable[[Any, Tensor], Any]) -> None:
    assert pairs(Net(use), backwards=True) == [("follower", "layer")]
    assert pairs(Net(use, in_place=True), backwards=True) == []


def test_names_of_followers_and_layers() -> None:
    net = Net(USES["straight"][0])
    net.alias = net.layer
    assert pairs(net) == [("layer", "follower")]
    net.again = net.follower
    assert pairs(net) == []
    assert paths_of(net)[net.layer] == ["layer", "alias"]
    (one,) = found_in(net)
    assert (one.layer, one.follower, one.shared) == (net.layer, net.follower, True)
    assert paths_of(net)[net] == [""]


def test_a_follower_that_is_given_its_input_by_name() -> None:
    assert pairs(Net(lambda one, rows: one.follower(input=one.layer(rows)))) == []
    assert pairs(Net(lambda one, rows: one.follower(one.layer(input=rows)))) == [("layer", "follower")]


def seen_by(module: nn.Module, *, backwards: bool = False) -> set[str]:
    names = {part: name for name, part in module.named_modules()}
    (one,) = found_in(module, backwards=backwards)
    assert one.shape == (1, 3, 4, 5)
    return {names[part] for part in one.seen_by}


@pytest.mark.parametrize("in_place", [False, True])
def test_who_sees_what_goes_from_one_to_the_other(in_place: bool) -> None:
    def through(one: Any, rows: Tensor) -> Any:
        return one.same(one.follower(one.box(one.layer(rows))))

    between = {"layer", "box", "box.0", "box.1", "follower"}
    assert seen_by(Net(through, in_place)) == between
    # And what either lies in without the other.
    wrapped = nn.Sequential(nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1)), nn.ReLU6(in_place))
    assert seen_by(wrapped) == {"0", "0.1", "1"}
    wrapped = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU6(in_place), nn.Identity()), nn.Identity())
    assert seen_by(wrapped) == {"0", "1", "1.0"}
    tuples = Net(lambda one, rows: one.follower(one.same(input=(one.layer(rows), 1))[0]), in_place)
    assert seen_by(tuples) == {"layer", "same", "follower"}


def test_who_has_it_before_it_is_changed_in_place() -> None:
    def use(one: Any, rows: Tensor) -> Any:
        return one.other(one.layer(one.box(one.follower(one.same(rows * 1)))))

    assert seen_by(Net(use, False), backwards=True) == {"follower", "box", "box.0", "box.1", "layer"}
    assert seen_by(Net(use, True), backwards=True) == {"same", "follower", "box", "box.0", "box.1", "layer"}


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_in_place(in_place: bool) -> None:
    def changed(use: Callable[[Any, Tensor], Any]) -> bool:
        net = Net(use, in_place)
        found = changed_in_place(net, lambda: net(rows()), is_follower)
        assert found <= {net.follower}
        return bool(found)

    def given(one: Any, rows: Tensor) -> Any:
        out = one.layer(rows)
        result = one.follower(out)
        out.mul_(2)
        return result

    def result(one: Any, rows: Tensor) -> Any:
        out = one.follower(one.layer(rows))
        out += rows
        return out

    def a_view(one: Any, rows: Tensor) -> Any:
        out = one.follower(one.layer(rows))[:, 1:]
        out += 1
        return out

    assert changed(given)
    assert changed(result)
    assert changed(a_view)
    assert changed(lambda one, rows: one.change(one.follower(rows * 1)))
    assert not changed(lambda one, rows: one.follower(one.layer(rows)) + rows)
    assert not changed(lambda one, rows: one.follower(one.change(rows * 1)))


def test_nothing_is_left_behind() -> None:
    def fails(one: Any, rows: Tensor) -> Any:
        one.follower(one.layer(rows))
        raise KeyError

    for net in (Net(USES["straight"][0]), Net(fails)):
        net.train()
        net.layer.eval()
        for search in (
            lambda net=net: followed(net, lambda: net(rows()), is_layer, is_follower),
            lambda net=net: changed_in_place(net, lambda: net(rows()), is_follower),
        ):
            if net.use is fails:
                with pytest.raises(KeyError):
                    search()
            else:
                search()
        assert not any(has_hooks(part) for part in net.modules())
        assert [name for name, part in net.named_modules() if not part.training] == ["layer"]


def test_parts_of_torchscript() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Identity()))
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU6(), scripted)
    assert pairs(net) == [("0", "1")]
    assert changed_in_place(net, lambda: net(rows()), is_follower) == set()


def test_hooks() -> None:
    def hook(*given: Any) -> None:
        pass

    part = nn.ReLU6()
    assert not has_hooks(part)
    for register in (
        part.register_forward_hook,
        part.register_forward_pre_hook,
        part.register_full_backward_hook,
        part.register_full_backward_pre_hook,
    ):
        with register(hook):
            assert has_hooks(part)
        assert not has_hooks(part)
