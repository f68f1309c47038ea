"""Models made ready for attacks: frozen, folded, laid out and computing in the precision asked for."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from alignfast.checks import check_choice, check_images
from alignfast.models.attention import use_packed_attention
from alignfast.models.basic_block import BasicBlock, blocks_of, use_block_kernel
from alignfast.models.checkpoint import fingerprint
from alignfast.models.classifier import Classifier, as_classifier, evaluating, fit_size
from alignfast.models.depthwise import Chain, chains_of, use_kernel
from alignfast.models.ensemble import Ensemble
from alignfast.models.folding import folded
from alignfast.models.frozen import keep_less
from alignfast.models.inverted_residual import use_residual_kernel, with_residuals
from alignfast.models.minimal_filtering import use_minimal_filtering
from alignfast.models.vit_block import use_partwise_blocks
from alignfast.native import CPU_DEVICES

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The least cosine between logits and between input gradients of a faithful form and of the model as it was.
FAITHFUL = 0.95
# What timm's attention layers are told by whether to use torch's fused kernels.
FUSED = "fused_attn"
# Images of the example that are shown to forms when they are compared, and on which a model is folded.
MOST_SHOWN, FEWEST_SHOWN = 8, 2
# Rounds in which those forms are timed that the first round left within this factor of the fastest.
ROUNDS, STILL_IN_THE_RACE = 3, 1.25


@dataclass(frozen=True)
class Form:
    """How the passes of a model are computed.

    dtype: of weights and activations. channels_last: their layout. fused_attention: by torch's fused kernels, which
    on CPUs compute in float32 at least, or by two products with a softmax between them; None without attention of
    timm's. compiled: by torch.compile, once for each shape.
    """

    dtype: torch.dtype
    channels_last: bool = False
    fused_attention: bool | None = None
    compiled: bool = False

    def __str__(self) -> str:
        parts = [NAMES.get(self.dtype, str(self.dtype)), "channels-last" if self.channels_last else "contiguous"]
        if self.fused_attention is not None:
            parts.append("fused attention" if self.fused_attention else "plain attention")
        return ", ".join([*parts, "compiled"] if self.compiled else parts)


@dataclass(frozen=True)
class Trial:
    """seconds: the fastest pass, forward and to the images. cosine: the least over the images shown, of logits and of
    input gradients, to the model as it was. failure: why it does not run, else None."""

    form: Form
    seconds: float = float("inf")
    cosine: float = 0.0
    failure: str | None = None

    @property
    def faithful(self) -> bool:
        return self.failure is None and self.cosine >= FAITHFUL

    def __str__(self) -> str:
        if self.failure is not None:
            return f"{self.form}: does not run ({self.failure})"
        told = "" if self.faithful else f", below {FAITHFUL}, so not taken"
        return f"{self.form}: {self.seconds * 1e3:.4g} ms, cosine to fp32 {self.cosine:.4f}{told}"


@dataclass(frozen=True)
class Preparation:
    """What `prepare` chose and why. trials: all that was measured; none where the form follows from the precision.
    members: those of an ensemble's models, the first of which has the form."""

    form: Form
    trials: tuple[Trial, ...] = ()
    members: tuple[Preparation, ...] = ()

    def __str__(self) -> str:
        if self.members:
            return "\n".join(map(str, self.members))
        lines = [str(self.form)]
        if self.trials:
            lines[0] += ", the fastest faithful of:"
            lines += [f"  {trial}" for trial in self.trials]
        return "\n".join(lines)


@dataclass(frozen=True)
class Fusions:
    """Layers of a model that kernels do at once, by their names: depthwise convolutions with what lies around them,
    and basic blocks."""

    chains: Sequence[Chain] = ()
    blocks: Sequence[BasicBlock] = ()


def prepare(
    model: nn.Module, images: Tensor, precision: Precision | Preparation = "auto", *, compiled: bool = False
) -> Classifier:
    """A copy of `model` for attacks and evaluation: weights frozen, batch normalisations folded, the fastest layout.

    Images go in as they are, float32 [N, C, H, W] in [0, 1], and logits come out in float32; normalisation is in
    float32, rounded once. The input gradients that attacks take in fp16 are scaled image by image, so that small ones
    do not vanish. Layers keep for the backward pass only what an input gradient needs. On CPUs convolutions of 3 x 3 in
    float32 are computed with fewer products, which moves logits by 1e-5 of their size. The members of an ensemble are
    prepared each. A model whose logits would change by folding is left unfolded, with a warning.

    With a precision that is named, the form follows from the model and the device, so that it is the same in every
    run: convolutional networks are laid out channels-last. "auto" measures the few forms on up to 8 images of the
    example, and takes the fastest of those whose logits and input gradients keep a cosine of 0.95 to the model's own;
    bf16 is among them where the device computes it in hardware. It remembers its choice for the same weights, shape,
    device and number of threads as long as the process lives. `str(prepared.preparation)` says what was chosen and why.

    Args:
        model: anything that maps images to logits; not changed.
        images: an example, float32 on the model's device.
        precision: "fp32", "bf16", "fp16" or "auto"; or what an earlier call chose for this model, its `preparation`.
        compiled: compile the passes by torch.compile for static shapes, those of the example first; "auto" then
            measures forms with it and without, on the whole example. On a CPU it is mostly slower, and each shape costs
            a minute or more.

    Raises:
        ValueError: an unknown precision, images that the model does not take, or a model that does not run on them in
            this precision.

    Warns:
        RuntimeWarning: the device computes this precision in software, which is far slower than fp32.
    """
    chosen = precision if isinstance(precision, Preparation) else None
    name = check_choice("precision", NAMES[chosen.form.dtype] if chosen else str(precision), ("auto", *DTYPES))
    source = as_classifier(model)
    check_images("images", images)
    source.check_shape(images)
    if type(source) is Ensemble:
        parts = chosen.members if chosen else [precision] * len(source.members)
        each = zip(source.members, parts, strict=True)
        return _together(source, [prepare(member, images, part, compiled=compiled) for member, part in each])
    dtypes = [DTYPES[name]] if name != "auto" else _fast_dtypes(images.device)
    if not in_hardware(dtypes[0], images.device):
        text = f"precision: {images.device} computes {name} in software, far slower than fp32"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    with _refusing(name, images.device):
        base = _base(source, images[:FEWEST_SHOWN])
        fusions = fusions_in(base, images)
    if name == "auto":
        key = (fingerprint(source), tuple(images.shape), str(images.device), torch.get_num_threads(), compiled)
        if key not in _CHOSEN:
            shown = images if compiled else images[:MOST_SHOWN]
            _CHOSEN[key] = _measured(source, base, fusions, _forms(base, dtypes, compiled), shown)
        chosen = _CHOSEN[key]
    form = chosen.form if chosen else replace(form_in(base, dtypes[0]), compiled=compiled)
    prepared = shaped(base, form, fusions)
    if name != "auto":
        _pass(prepared, images if compiled else images[:1], name)
    prepared.preparation = chosen or prepared.preparation
    return prepared


def _together(source: Ensemble, members: Sequence[Classifier]) -> Ensemble:
    ensemble = Ensemble(members, source.combine).eval().requires_grad_(False)
    chosen = tuple(member.preparation for member in members if member.preparation is not None)
    ensemble.preparation = Preparation(chosen[0].form, members=chosen)
    return ensemble


# What "auto" found, for the life of the process.
_CHOSEN: dict[Hashable, Preparation] = {}


def fusions_in(model: Classifier, images: Tensor) -> Fusions:
    """What of a model the package's kernels can do at once, which is on CPUs only."""
    if type(model) is not Classifier or images.device.type not in CPU_DEVICES:
        return Fusions()

    def run() -> Tensor:
        return model.logits(fit_size(images[:1], model))

    module = model.module
    return Fusions(with_residuals(module, run, chains_of(module, run)), blocks_of(module, run))


def shaped(model: Classifier, form: Form, fusions: Fusions) -> Classifier:
    """A copy of a frozen model that computes in this form. fusions: those in it, by `fusions_in`."""
    result = copy.deepcopy(model)
    result.compute_in(form.dtype)
    for member in result.members:
        flat = form.channels_last and _is_convolutional(member)
        layout = torch.channels_last if flat else torch.contiguous_format
        member.module.to(memory_format=layout)
        member.memory_format = layout
        for part in _attentions(member):
            setattr(part, FUSED, form.fused_attention)
        here = all(one.device.type in CPU_DEVICES for one in member.parameters())
        if here and flat:
            use_kernel(member.module, fusions.chains)
            if not form.compiled:
                use_residual_kernel(member.module, fusions.chains)
            use_minimal_filtering(member.module)
        if here:
            use_packed_attention(member.module)
            if not form.compiled:
                use_partwise_blocks(member.module)
        keep_less(member.module)
        if here and flat and not form.compiled:
            use_block_kernel(member.module, fusions.blocks)
        if form.compiled:
            member.module.compile(dynamic=False)
    result.preparation = Preparation(form)
    return result


def form_in(model: Classifier, dtype: torch.dtype) -> Form:
    """The form for a precision that is named, which measures nothing."""
    return Form(dtype, _is_convolutional(model), _attention(model))


def _base(source: Classifier, images: Tensor) -> Classifier:
    """A frozen copy in evaluation mode, its batch normalisations folded where that can be done."""
    # Surgeries and collections of weights mean the layers as they were.
    if type(source) is Classifier:
        return folded(source, images)
    return copy.deepcopy(source).eval().requires_grad_(False)


def _forms(base: Classifier, dtypes: Sequence[torch.dtype], compiled: bool) -> list[Form]:
    layouts = (False, True) if _is_convolutional(base) else (False,)
    attentions = (None,) if _attention(base) is None else (True, False)
    return [Form(*parts) for parts in product(dtypes, layouts, attentions, (False, True) if compiled else (False,))]


def _measured(
    source: Classifier, base: Classifier, fusions: Fusions, forms: Sequence[Form], images: Tensor
) -> Preparation:
    plain = copy.deepcopy(source).eval().requires_grad_(False)
    wanted = _pass(plain, images, "fp32")
    racing: dict[Form, Classifier] = {}
    trials: dict[Form, Trial] = {}
    for form in forms:
        candidate = shaped(base, form, fusions)
        try:
            found = _pass(candidate, images, "auto")
        except ValueError as error:
            trials[form] = Trial(form, failure=str(error))
            continue
        cosine = min(_cosine(one, other) for one, other in zip(found, wanted, strict=True))
        trials[form] = Trial(form, cosine=cosine)
        if trials[form].faithful:
            racing[form] = candidate
    for _ in range(ROUNDS):
        for form, candidate in racing.items():
            trials[form] = replace(trials[form], seconds=min(trials[form].seconds, _seconds(candidate, images)))
        fastest = min((trials[form].seconds for form in racing), default=0.0)
        racing = {form: one for form, one in racing.items() if trials[form].seconds <= STILL_IN_THE_RACE * fastest}
    # In the first form where none is faithful: the precision of the model, in its own layout.
    best = min(racing, key=lambda form: trials[form].seconds, default=forms[0])
    return Preparation(best, tuple(trials.values()))


def _pass(prepared: Classifier, images: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The logits, and the input gradient of the largest logit of each image."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), evaluating(prepared), _refusing(precision, images.device):
        logits = prepared.logits(leaf)
        (grad,) = torch.autograd.grad(logits.amax(-1).sum(), leaf)
    return logits.detach(), grad


@contextmanager
def _refusing(precision: str, device: torch.device) -> Iterator[None]:
    """What torch refuses inside is refused as a precision in which the model does not run."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"precision: got {precision!r}, in which the model does not run on {device} "
            f"({str(error).splitlines()[0]}); allowed is one that it supports, such as fp32"
        ) from error


def _cosine(values: Tensor, wanted: Tensor) -> float:
    """The least over images."""
    return float(torch.cosine_similarity(values.flatten(1).double(), wanted.flatten(1).double()).min())


def _seconds(prepared: Classifier, images: Tensor) -> float:
    _wait(images.device)
    begun = time.perf_counter()
    _pass(prepared, images, "auto")
    _wait(images.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_convolutional(model: Classifier) -> bool:
    """In two dimensions, and not a transformer, whose only convolution makes its patches."""
    parts = list(model.modules())
    flat, deep = (sum(isinstance(part, kind) for part in parts) for kind in (nn.Conv2d, nn.Conv3d))
    return flat > 1 and deep == 0


def _attentions(model: nn.Module) -> list[nn.Module]:
    """timm's layers that can do it either way."""
    return [part for part in model.modules() if isinstance(getattr(part, FUSED, None), bool)]


def _attention(model: nn.Module) -> bool | None:
    """As the model has it; None where it has none."""
    parts = _attentions(model)
    return None if not parts else all(getattr(part, FUSED) for part in parts)


def _fast_dtypes(device: torch.device) -> list[torch.dtype]:
    return [dtype for dtype in (torch.float32, torch.bfloat16) if in_hardware(dtype, device)]


def in_hardware(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device computes in float32, bfloat16 or float16 without emulating it; True where it is not known."""
    if dtype == torch.float32 or device.type not in ("cpu", "cuda"):
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
