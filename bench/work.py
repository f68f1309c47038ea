"""What a case of an op runs: inputs from fixed seeds, the op, and the PyTorch expression written in its place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignfast import ops
from alignfast.reference.philox_uniform import philox_uniform as reference_draws

from .sides import Expression, Run, Tensors, Work

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 4.0
ALPHA, EPS, DECAY = 2 / 255, 8 / 255, 1.0
SMOOTHING = 15
# Errors as `sides.error` counts them: of one rounding to the result's dtype, of two passes with a rounding each, of
# a chain whose every intermediate result has that dtype, and of coordinates in float32, which are good to 1e-5 of a
# pixel where images of noise change by 1 from one to the next.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
PASSES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
CHAIN = {torch.float32: 1e-4, torch.bfloat16: 2.0**-4}
# Of a sum of 36 products by minimal filtering.
MINIMAL = 5e-5
COORDINATES = {torch.float32: 1e-3, torch.bfloat16: 2.0**-7}
# Inputs are drawn on the CPU, so that they are the same everywhere. On torch's "meta" device nothing is: it is where
# the bytes of a case are counted.
CPU = torch.device("cpu")


def uniform(
    shape: tuple[int, ...], seed: int, low: float = 0.0, high: float = 1.0, *, device: torch.device = CPU
) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, device=device)
    return torch.empty(shape).uniform_(low, high, generator=torch.Generator().manual_seed(seed)).to(device)


def normal(shape: tuple[int, ...], seed: int, *, device: torch.device = CPU) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def kl_div_with_logits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """Loss and gradient; reads both logits and writes the gradient and the loss."""
    student, teacher = ((3 * normal(shape, seed, device=device)).to(dtype) for seed in (1, 2))

    def bind(expression: Expression, *, student: Tensor = student, teacher: Tensor = teacher) -> Run:
        leaf = student.detach().requires_grad_()

        def call() -> Tensors:
            loss = expression(leaf, teacher)
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return call

    return Work(
        ours=bind(partial(ops.kl_div_with_logits, temperature=TEMPERATURE)),
        expression=kl_chain,
        bind=bind,
        expected=lambda: bind(kl_chain, student=student.double(), teacher=teacher.double())(),
        tolerance=ROUNDING[dtype],
        slack=CHAIN[dtype],
        moved=3 * student.nbytes + torch.float32.itemsize,
        device=device,
    )


def kl_chain(student: Tensor, teacher: Tensor) -> Tensor:
    # bfloat16 throughout would be slower and off by a quarter of a typical gradient.
    student, teacher = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (student, teacher))
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def sign_step(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, momentum: bool) -> Work:
    """Reads the point, the images, the gradient and, if given, the momentum; writes the point and the momentum."""

    def sign(seed: int) -> Tensor:
        return draw(seed, -1.0, 1.0).sign()

    draw = partial(uniform, shape, device=device)
    images = draw(1).to(dtype)
    adv = (images + draw(2, -EPS, EPS).to(dtype)).clamp(0, 1)
    grad = (sign(3) * draw(4, 0.5, 1.5)).to(dtype)
    # Weaker or stronger than the normalised gradient by a margin, so that no rounding turns the sign of their sum.
    strength = torch.where(draw(5) < 0.5, draw(6, 0.0, 0.25), draw(7, 2.0, 3.0))
    state = (adv, (sign(8) * strength).to(dtype)) if momentum else (adv,)
    mine = tuple(tensor.clone() for tensor in state)
    decay = DECAY if momentum else 0.0

    def ours() -> Tensors:
        point, *memory = mine
        ops.sign_step(point, images, grad, *memory, alpha=ALPHA, eps=EPS, decay=decay)
        return mine

    def bind(expression: Expression) -> Run:
        return lambda: expression(images, grad, *state)

    return Work(
        ours=ours,
        expression=momentum_chain if momentum else sign_chain,
        bind=bind,
        expected=lambda: (momentum_chain if momentum else sign_chain)(
            images.double(), grad.double(), *(tensor.double() for tensor in state)
        ),
        tolerance=ROUNDING[dtype],
        slack=CHAIN[dtype],
        moved=(2 + 2 * len(state)) * images.nbytes,
        device=device,
    )


def momentum_chain(images: Tensor, grad: Tensor, adv: Tensor, momentum: Tensor) -> Tensors:
    grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
    grad = grad + momentum * DECAY
    return *sign_chain(images, grad, adv), grad


def sign_chain(images: Tensor, grad: Tensor, adv: Tensor) -> Tensors:
    adv = adv + ALPHA * grad.sign()
    delta = torch.clamp(adv - images, min=-EPS, max=EPS)
    return (torch.clamp(images + delta, min=0, max=1),)


def smooth(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """Reads the gradient and writes the smoothed one."""
    grad = normal(shape, 1, device=device).to(dtype)
    bell = torch.exp(-0.5 * torch.linspace(-3, 3, SMOOTHING) ** 2)
    kernel = (bell / bell.sum()).to(device, dtype)
    dense = torch.outer(kernel.float(), kernel.float()).expand(shape[1], 1, SMOOTHING, SMOOTHING)

    def convolve(grad: Tensor, dense: Tensor) -> Tensors:
        return (F.conv2d(grad, dense, padding="same", groups=shape[1]),)

    stacked = dense.to(dtype).contiguous()
    # A GPU may convolve float32 in TF32, and is quick at float64.
    precise = torch.float64 if device.type == "cuda" else torch.float32
    return Work(
        ours=lambda: (ops.smooth(grad, kernel),),
        expression=convolve,
        bind=lambda expression: lambda: expression(grad, stacked),
        expected=lambda: convolve(grad.to(precise), dense.to(precise)),
        tolerance=PASSES[dtype],
        slack=CHAIN[dtype],
        moved=2 * grad.nbytes,
        device=device,
        # Compiled it is channels-last, for which torch 2.14 has no bfloat16 kernel worth the name on a CPU.
        compiles=device.type != "cpu" or dtype != torch.bfloat16,
    )


def depthwise_conv2d(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, side: int, stride: int, gradient: str = ""
) -> Work:
    """Of channels-last images, between the two ReLU6 of an inverted residual; or the gradient of its images or weight.

    Reads the images and writes the result. The gradient of the "images" reads those and the result again, and the
    gradient of the result, and writes one. That of the "weight" is without the ReLU6, as in training, and reads images
    and the gradient of the result. The weight's few numbers are not counted.
    """

    def eighths(shape: tuple[int, ...], seed: int, low: float, high: float) -> Tensor:
        return (8 * uniform(shape, seed, low, high, device=device)).floor() / 8

    def rectified(values: Tensor) -> Tensor:
        return values if gradient == "weight" else F.relu6(values)

    def convolved(images: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(rectified(images), weight, bias.to(weight.dtype), stride, side // 2, groups=shape[1])

    def chain(images: Tensor, weight: Tensor) -> Tensor:
        return rectified(convolved(images, weight))

    def precise(images: Tensor, weight: Tensor) -> Tensor:
        result = convolved(images, weight)
        # Whether a gradient passes a ReLU6 is seen from what was stored.
        return rectified(result + (result.to(dtype).float() - result).detach())

    # Sums of these are exact in any order, and none is a bound of a ReLU6, where a rounding would let a gradient pass.
    images = eighths(shape, 1, -2.0, 8.0).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = eighths((shape[1], 1, side, side), 2, -1.0, 1.0).to(dtype)
    bias = (eighths(shape[1:2], 3, -1.0, 1.0) + 1 / 128).to(dtype)
    sides = [(size + 2 * (side // 2) - side) // stride + 1 for size in shape[2:]]
    incoming = normal((*shape[:2], *sides), 4, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    settings: dict[str, Any] = {"bias": bias, "stride": (stride, stride), "padding": (side // 2,) * 4}
    if gradient != "weight":
        settings |= {"before": (0.0, 6.0), "after": (0.0, 6.0)}

    def bind(
        expression: Expression, images: Tensor = images, weight: Tensor = weight, incoming: Tensor = incoming
    ) -> Run:
        if not gradient:
            return lambda: (expression(images, weight),)
        given = {"images": images, "weight": weight}
        leaf = given[gradient] = given[gradient].detach().requires_grad_()
        result = cache(lambda: expression(**given))
        return lambda: torch.autograd.grad(result(), leaf, incoming, retain_graph=True)

    moved = images.nbytes + incoming.nbytes
    return Work(
        ours=bind(partial(ops.depthwise_conv2d, **settings)),
        expression=chain,
        bind=bind,
        expected=lambda: bind(precise, images.float(), weight.float(), incoming.float())(),
        tolerance=ROUNDING[dtype],
        slack=CHAIN[dtype],
        moved=2 * moved if gradient == "images" else moved,
        device=device,
    )


def inverted_residual(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, gradient: bool = False
) -> Work:
    """With a 3 x 3 kernel, of channels-last images with a sixth as many channels as `shape`, which lies between.

    Reads the images and writes the result, or the gradients of both; what bounds it is arithmetic. Weights and what is
    kept for the gradient, a bit for each value between, are not counted.
    """
    between, narrow = shape[1], max(1, shape[1] // 6)

    def eighths(shape: tuple[int, ...], seed: int, limit: float = 1.0) -> Tensor:
        return (8 * uniform(shape, seed, -limit, limit, device=device)).floor() / 8

    def chain(images: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor) -> Tensor:
        first, second = (bias.to(images.dtype) for bias in biases)
        expanded = F.relu6(F.conv2d(images, expand, first))
        made = F.relu6(F.conv2d(expanded, depthwise, second, padding=1, groups=between))
        return F.conv2d(made, project)

    # Sums of these are exact in any order, and none is a bound of a ReLU6, where a rounding would let a gradient pass.
    shapes = ((between, narrow, 1, 1), (between, 1, 3, 3), (narrow, between, 1, 1))
    weights = tuple(eighths(one, seed).to(dtype) for seed, one in enumerate(shapes, 1))
    biases = tuple(eighths((between,), seed) + 1 / 1024 for seed in (4, 5))
    size = (shape[0], narrow, *shape[2:])
    images = eighths(size, 6, 4.0).to(dtype).contiguous(memory_format=torch.channels_last)
    incoming = normal(size, 7, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    packed = cache(
        lambda: ops.PackedResidual.of(
            weights[0], biases[0].to(dtype), weights[1], biases[1].to(dtype), weights[2], None
        )
    )

    def ours(images: Tensor, *weights: Tensor) -> Tensor:
        return ops.inverted_residual(images, packed(), padding=(1, 1, 1, 1))

    return _of_frozen(ours, chain, images, weights, incoming if gradient else None, ROUNDING[dtype])


def _of_frozen(
    ours: Expression, plain: Expression, images: Tensor, weights: Tensors, incoming: Tensor | None, tolerance: float
) -> Work:
    """A pass, or with a gradient the way back too, of which the weights have none."""

    def bind(
        expression: Expression,
        images: Tensor = images,
        weights: Tensors = weights,
        incoming: Tensor | None = incoming,
    ) -> Run:
        return _one_way(expression, images, *weights, incoming=incoming)

    doubled = None if incoming is None else incoming.double()
    return Work(
        ours=bind(ours),
        expression=plain,
        bind=bind,
        expected=lambda: bind(plain, images.double(), tuple(weight.double() for weight in weights), doubled)(),
        tolerance=tolerance,
        slack=CHAIN[images.dtype],
        moved=2 * images.nbytes,
        device=images.device,
    )


def winograd_conv2d(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, gradient: bool = False
) -> Work:
    """Of channels-last images, to as many channels; reads the images and writes the result, or gradients of both."""
    channels = shape[1]
    images = normal(shape, 1, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    incoming = normal(shape, 2, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (normal((channels, channels, 3, 3), 3, device=device) / (3 * channels**0.5)).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    plain = partial(F.conv2d, padding=1)

    def bind(
        expression: Expression, images: Tensor = images, weight: Tensor = weight, incoming: Tensor = incoming
    ) -> Run:
        return _one_way(expression, images, weight, incoming=incoming if gradient else None)

    return Work(
        ours=bind(ops.winograd_conv2d),
        expression=plain,
        bind=bind,
        expected=lambda: bind(plain, images.double(), weight.double(), incoming.double())(),
        tolerance=MINIMAL,
        slack=CHAIN[dtype],
        moved=images.nbytes + incoming.nbytes,
        device=device,
    )


def basic_block(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, gradient: bool = False) -> Work:
    """Of channels-last images, with as many channels inside; reads the images and writes the result, or gradients."""
    channels = shape[1]
    images = normal(shape, 1, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    incoming = normal(shape, 2, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = tuple(
        (normal((channels, channels, 3, 3), seed, device=device) / (3 * channels**0.5))
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for seed in (3, 4)
    )

    def plain(images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.relu(images + F.conv2d(F.relu(F.conv2d(images, first, padding=1)), second, padding=1))

    def ours(images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return ops.basic_block(images, first, None, second, None)

    return _of_frozen(ours, plain, images, weights, incoming if gradient else None, MINIMAL)


def attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, gradient: bool = False) -> Work:
    """Of [N, tokens, 3, heads, width]; reads them and writes the result, or the gradients of both.

    The expression is torch's fused attention of the three and, for the gradient, what stacks theirs.
    """
    packed = normal(shape, 1, device=device).to(dtype)
    incoming = normal((*shape[:2], shape[3] * shape[4]), 2, device=device).to(dtype)

    def fused(packed: Tensor) -> Tensor:
        queries, keys, values = packed.permute(2, 0, 3, 1, 4).unbind(0)
        made = F.scaled_dot_product_attention(queries, keys, values)
        return made.transpose(1, 2).flatten(2)

    def bind(expression: Expression, packed: Tensor = packed, incoming: Tensor = incoming) -> Run:
        return _one_way(expression, packed, incoming=incoming if gradient else None)

    return Work(
        ours=bind(ops.attention),
        expression=fused,
        bind=bind,
        expected=lambda: bind(fused, packed.double(), incoming.double())(),
        tolerance=ROUNDING[dtype],
        slack=CHAIN[dtype],
        moved=packed.nbytes + incoming.nbytes,
        device=device,
    )


def batch_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, backward: bool) -> Work:
    """Of channels-last images, with the ReLU6 behind it; reads them and writes the result. The gradient reads them and
    the gradient of the result, and writes one. What is of a channel is not counted."""

    def chain(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu6(F.batch_norm(images, None, None, weight, bias, training=True))

    images, incoming = (
        normal(shape, seed, device=device).to(dtype).contiguous(memory_format=torch.channels_last) for seed in (1, 2)
    )
    channels = (uniform(shape[1:2], 3, 0.5, 1.5, device=device), normal(shape[1:2], 4, device=device))
    # Where rounding decides whether a gradient passes the ReLU6, there is none.
    weight, bias = (one.double() for one in channels)
    clipped = F.batch_norm(images.double(), None, None, weight, bias, training=True)
    incoming = incoming * ((clipped.abs() > CHAIN[dtype]) & ((clipped - 6).abs() > CHAIN[dtype]))

    def ours(*given: Tensor) -> Tensor:
        return ops.batch_norm(*given, clip=(0.0, 6.0))[0]

    def bind(expression: Expression, given: Tensors = (images, *channels), incoming: Tensor = incoming) -> Run:
        if not backward:
            return lambda: (expression(*given),)
        leaves = tuple(tensor.detach().requires_grad_() for tensor in given)
        result = cache(lambda: expression(*leaves))
        return lambda: torch.autograd.grad(result(), leaves, incoming, retain_graph=True)

    return Work(
        ours=bind(ours),
        expression=chain,
        bind=bind,
        expected=lambda: bind(chain, tuple(one.double() for one in (images, *channels)), incoming.double())(),
        tolerance=ROUNDING[dtype],
        slack=CHAIN[dtype],
        moved=(3 if backward else 2) * images.nbytes,
        device=device,
    )


def philox_uniform(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """Writes the draws, whose dtype is always float32; the expression is torch's own generator, keyed by nothing."""
    assert dtype == torch.float32
    images = torch.arange(shape[0], device=device) + 1000
    copies = torch.zeros(1, dtype=torch.int64, device=device)
    key = {"seed": 0x123456789ABCDEF, "step": 7, "purpose": 3}
    return Work(
        ours=lambda: (ops.philox_uniform(images, copies, shape[1:], **key),),
        expression=torch.rand,
        bind=lambda expression: lambda: (expression((1, *shape), device=device),),
        expected=lambda: (reference_draws(images, copies, shape[1:], **key, low=0.0, high=1.0),),
        tolerance=0.0,
        slack=None,
        moved=torch.float32.itemsize * torch.Size(shape).numel(),
        device=device,
    )


@dataclass(frozen=True)
class Place:
    """The resize-and-pad that a whole batch gets, as torchattacks and TransferAttack draw it."""

    resized: int
    top: int
    left: int
    padded: int

    @staticmethod
    def draw(side: int, rate: float, seed: int) -> Place:
        """Below a rate of 1 torchattacks' definition, above it TransferAttack's."""
        low, high = sorted((side, int(side * rate)))
        unit = uniform((3,), seed).tolist()
        resized = low + int(unit[0] * (high - low))
        top, left = (int(part * (high - resized)) for part in unit[1:])
        return Place(resized, top, left, high)

    def __call__(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        small = F.interpolate(images, size=(self.resized, self.resized), mode="bilinear", align_corners=False)
        right, bottom = (self.padded - self.resized - start for start in (self.left, self.top))
        padded = F.pad(small, (self.left, right, self.top, bottom), value=0)
        if self.padded == side:
            return padded
        return F.interpolate(padded, size=(side, side), mode="bilinear", align_corners=False)


def diversify(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    copies: int = 1,
    rate: float | None = None,
    radius: float | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    backward: bool = False,
) -> Work:
    """float32 images to the model's batch in `dtype`, or back from the gradient of that batch.

    Copies are scaled by 1, 1/2, 1/4, ... where there is a geometry. Forward reads the images and writes the batch,
    backward reads the batch's gradient and writes that of the images; K numbers an image are not counted.
    """
    images = uniform(shape, 1, device=device)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    places = None if rate is None else [Place.draw(shape[-1], rate, 10 + copy) for copy in range(copies)]
    noise = None
    if radius is not None:
        numbers = (torch.arange(count, device=device) for count in (shape[0], copies))
        noise = ops.Noise(radius, 5, 3, 1, *numbers)

    def chain(images: Tensor, draws: Tensor | None = None, dtype: torch.dtype = dtype) -> Tensor:
        rows = []
        for copy in range(copies):
            row = images
            if radius is not None:
                row = row + (torch.empty_like(row).uniform_(-radius, radius) if draws is None else draws[copy])
            if places is not None:
                row = places[copy](row / 2**copy if copies > 1 else row)
            rows.append(row)
        batch = torch.cat(rows) if copies > 1 else rows[0]
        batch = (batch - mean[:, None, None]) / std[:, None, None]
        return batch.to(dtype).contiguous(memory_format=memory_format)

    ours = partial(
        ops.diversify,
        copies=copies,
        noise=noise,
        scale=_scales(copies, shape[0], device) if places and copies > 1 else None,
        resize_pad=_resize_pad(places, shape[0], device) if places else None,
        mean=mean,
        std=std,
        dtype=dtype,
        memory_format=memory_format,
    )

    def precise(images: Tensor) -> Tensor:
        draws = None
        if noise is not None:
            key = (noise.seed, noise.step, noise.purpose)
            draws = reference_draws(noise.images, noise.copies, shape[1:], *key, -noise.radius, noise.radius)
        return chain(images, draws, torch.float32)

    drawn = normal((copies * shape[0], *shape[1:]), 2, device=device)
    incoming = drawn.to(dtype).contiguous(memory_format=memory_format)

    def bind(expression: Expression, incoming: Tensor = incoming) -> Run:
        leaf = images.detach().requires_grad_()
        if not backward:
            return lambda: (expression(leaf).detach(),)
        batch = cache(lambda: expression(leaf))
        return lambda: torch.autograd.grad(batch(), leaf, incoming, retain_graph=True)

    # The gradient of the images is float32 whatever the batch is.
    result = torch.float32 if backward else dtype
    return Work(
        ours=bind(ours),
        expression=chain,
        bind=bind,
        expected=lambda: bind(precise, incoming.float())(),
        tolerance=COORDINATES[result],
        slack=None if radius is not None and not backward else COORDINATES[result],
        moved=images.nbytes + incoming.nbytes,
        device=device,
    )


def _scales(copies: int, count: int, device: torch.device) -> Tensor:
    return torch.exp2(-torch.arange(copies, device=device).float())[:, None].expand(copies, count)


def _resize_pad(places: list[Place], count: int, device: torch.device) -> ops.ResizePad:
    """Each copy's geometry for all images alike."""

    def grid(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)[:, None].expand(len(places), count)

    resized, top, left = (grid([getattr(place, name) for place in places]) for name in ("resized", "top", "left"))
    return ops.ResizePad(resized, top, left, places[0].padded)


def _one_way(expression: Expression, first: Tensor, *others: Tensor, incoming: Tensor | None) -> Run:
    """The result, or where a gradient comes in, that of `first` alone."""
    if incoming is None:
        return lambda: (expression(first, *others),)
    leaf = first.detach().requires_grad_()
    result = cache(lambda: expression(leaf, *others))
    return lambda: torch.autograd.grad(result(), leaf, incoming, retain_graph=True)
