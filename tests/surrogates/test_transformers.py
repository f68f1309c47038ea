"""Token gradients and attention without gradients, against a transformer written out with tensors of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from alignfast.surrogates import NoAttention, SkipGradient, TokenGradients, surrogate
from tests.surrogates.nets import input_gradient, net, photos

HEADS, DEPTH = 2, 2


def transformer(m: Any, x: Tensor, blind: bool = False, regular: tuple[float, float, float] | None = None) -> Tensor:
    x = m.patch_embed(x)
    x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], 1) + m.pos_embed
    for block in m.blocks:
        qkv = block.attn.qkv(block.norm1(x))
        if regular:
            qkv = Extremes.apply(qkv, regular[1])
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
        attention = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        if regular:
            attention = Crosses.apply(attention, regular[0])
        if blind:
            attention = attention.detach()
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(block.attn.proj(mixed))
        perceptron = block.mlp.fc2(gelu(block.mlp.fc1(block.norm2(x))))
        if regular:
            perceptron = Extremes.apply(perceptron, regular[2])
        x = x + block.ls2(perceptron)
    return m.head(m.norm(x)[:, 0])


class Extremes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        result = grad.clone()
        for image in range(grad.shape[0]):
            for channel in range(grad.shape[2]):
                column = grad[image, :, channel].tolist()
                result[image, column.index(max(column)), channel] = 0
                result[image, column.index(min(column)), channel] = 0
        return result * ctx.factor, None


class Crosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        result = grad.clone()
        for image in range(grad.shape[0]):
            for head in range(grad.shape[1]):
                values = {(r, c): float(grad[image, head, r, c]) for r in range(5) for c in range(5)}
                # The second is looked for in the gradient as it came, too.
                for extreme in (max(values.values()), min(values.values())):
                    row, column = next(place for place, value in values.items() if value == extreme)
                    result[image, head, row, :] = 0
                    result[image, head, :, column] = 0
        return result * ctx.factor, None


def test_the_transformer_by_hand_is_the_model() -> None:
    model, images = net("vit"), photos("vit")
    torch.testing.assert_close(transformer(model, images), model(images), rtol=1e-10, atol=1e-12)


def test_attention_without_gradients() -> None:
    model, images = net("vit"), photos("vit")
    expected = input_gradient(lambda x: transformer(model, x, blind=True), images)
    torch.testing.assert_close(
        input_gradient(surrogate(model, NoAttention()).logits, images), expected, rtol=1e-9, atol=1e-14
    )
    assert not torch.allclose(input_gradient(model, images), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("factors", [(0.25, 0.75, 0.5), (1.0, 0.9, 0.3)])
def test_token_gradients(factors: tuple[float, float, float]) -> None:
    model, images = net("vit"), photos("vit")
    expected = input_gradient(lambda x: transformer(model, x, regular=factors), images)
    regular = surrogate(model, TokenGradients(*factors))
    torch.testing.assert_close(input_gradient(regular.logits, images), expected, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(input_gradient(model, images), expected, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(regular.logits(images), model(images), rtol=1e-10, atol=1e-12)


def test_fused_attention_is_switched_off_for_the_pass_only() -> None:
    model, images, seen = net("vit"), photos("vit"), []
    model.blocks[1].attn.fused_attn = False
    model.blocks[0].attn.fused_attn = True
    with model.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: seen.append(1)):
        surrogate(model, TokenGradients()).logits(images)
    assert seen == [1]
    assert [block.attn.fused_attn for block in model.blocks] == [True, False]


def test_the_forward_pass_without_attention_gradients_stays_the_same() -> None:
    model, images = net("vit", torch.float32), photos("vit", dtype=torch.float32)
    assert torch.equal(surrogate(model, NoAttention()).logits(images), model(images))


def test_token_gradients_and_weaker_branches_in_any_order() -> None:
    model, images = net("vit"), photos("vit")
    one = surrogate(surrogate(model, TokenGradients()), SkipGradient(0.5))
    other = surrogate(surrogate(model, SkipGradient(0.5)), TokenGradients())
    gradient = input_gradient(one.logits, images)
    assert torch.equal(gradient, input_gradient(other.logits, images))
    for part in (TokenGradients(), SkipGradient(0.5)):
        assert not torch.allclose(gradient, input_gradient(surrogate(model, part).logits, images), rtol=1e-3)


@pytest.mark.parametrize("surgery", [NoAttention(), TokenGradients()])
@pytest.mark.parametrize("name", ["cifar", "plain"])
def test_models_without_attention_are_refused(surgery: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"has no attention that is known; allowed are vision transformers of timm"):
        surrogate(net(name), surgery)


@pytest.mark.parametrize("name", ["attention", "qkv", "mlp"])
@pytest.mark.parametrize("value", [-0.5, 2.0, "much"])
def test_factors_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: got"):
        TokenGradients(**{name: value})
