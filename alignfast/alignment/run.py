"""What an alignment changes from step to step, and all that it takes to go on with it later."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alignfast.alignment.config import AlignConfig
from alignfast.alignment.held_out import device_of, measure
from alignfast.alignment.stream import Stream, set_generators
from alignfast.alignment.terms import Terms
from alignfast.data import Batch
from alignfast.distributed import current, gather
from alignfast.models import Classifier

# How often the losses are brought to the host where that waits for the device.
STEPS_BETWEEN_READINGS = 10
# Of the rate, at the first of the steps in which it rises.
FIRST_SHARE = 0.01


class Run:
    """A run of `total` steps, made before its first. history: entries of the steps that were read."""

    def __init__(
        self,
        terms: Terms,
        stream: Stream,
        config: AlignConfig,
        total: int,
        witnesses: Sequence[Classifier],
        held_out: Sequence[Batch],
    ) -> None:
        self.terms = terms
        self.ranks = current()
        self.model = terms.student.model
        self.device = device_of(self.model)
        self.config = config
        self.total = total
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.stopped = False
        self._stream = stream
        self._witnesses = witnesses
        self._held_out = held_out
        self._parameters = [one for one in terms.student.parameters() if one.requires_grad]
        self._optimizer = _optimizer(self._parameters, config)
        self._schedule = _schedule(self._optimizer, total, config)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        # The scaler leaves out steps whose gradient is not finite, and goes on.
        self._finite = ("loss",) if self._scaler.is_enabled() else ("loss", "grad_norm")
        self._average: AveragedModel | None = None
        if config.ema is not None:
            self._average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self._pending: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] | None = None
        self._best_cosine = -math.inf
        self._worse = 0

    def take(self, batches: Sequence[Batch]) -> None:
        """One step, along the mean gradient over the images of all `batches`, which are on the device."""
        epoch, batch = self._stream.epoch, self._stream.batch
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        shares = self._shares(batches)
        for place, (one, share) in enumerate(zip(batches, shares, strict=True), 1):
            # Gradients of several processes are added up behind the last batch alone.
            with nullcontext() if place == len(batches) else self.terms.alone():
                found = self.terms.of(one)
                self._scaler.scale(found["loss"] * share).backward()
            for name, term in found.items():
                sums[name] = sums.get(name, 0.0) + share * term.detach()
        sums = self._means(sums)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm or math.inf)
        self.step += 1
        entry = {"step": self.step, "lr": self._optimizer.param_groups[0]["lr"], **sums, "grad_norm": norm}
        if self.device.type == "cpu":
            # Before the update: the weights are then still those of the last good step.
            _refuse_non_finite(entry, self._finite, f"batch {batch} of pass {epoch + 1}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        self._pending.append(entry | self._measured())

    def _shares(self, batches: Sequence[Batch]) -> list[Tensor | float]:
        """What each batch counts, so that the mean of the ranks' losses is the mean over all images of all ranks."""
        counts = [len(one.images) for one in batches]
        if self.ranks.world == 1:
            return [count / sum(counts) for count in counts]
        total = torch.tensor(float(sum(counts)), device=self.device)
        dist.all_reduce(total)
        return [self.ranks.world * count / total for count in counts]

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Over the ranks."""
        if self.ranks.world == 1:
            return sums
        values = torch.stack(list(sums.values()))
        dist.all_reduce(values)
        return dict(zip(sums, (values / self.ranks.world).unbind(), strict=True))

    @property
    def readable(self) -> bool:
        """Whether it is time to read what is pending."""
        often = self.device.type == "cpu" or self.step % STEPS_BETWEEN_READINGS == 0
        return bool(self._pending) and (often or self.step == self.total or self.stopped)

    def read(self) -> list[dict[str, Any]]:
        """The entries of the steps since the last reading, which are part of the history from now on.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite.
        """
        entries = [_read(entry) for entry in self._pending]
        for entry in entries:
            _refuse_non_finite(entry, self._finite, "a batch since the last reading")
        self._pending.clear()
        self.history += entries
        return entries

    def finish(self) -> None:
        """Give the model the weights that are the result."""
        if self.config.patience is not None and self._best is not None:
            self.model.load_state_dict(self._best)
        elif self._average is not None:
            averaged = self._average.module
            for mine, theirs in zip(self.model.parameters(), averaged.parameters(), strict=True):
                mine.data.copy_(theirs)
        share_buffers(self.model)

    def state(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Of tensors and plain values alone; all ranks ask for it together. named: what tells this run from others."""
        self.terms.flush()
        return {
            "run": dict(named),
            "step": self.step,
            "student": self.terms.student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "history": json.dumps(self.history),
            "best": self._best,
            "best_cosine": self._best_cosine,
            "worse": self._worse,
            "stopped": self.stopped,
            "positions": gather(self._stream.position()),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; its generators are the global ones from here on."""
        self.terms.student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.step, self.history = state["step"], json.loads(state["history"])
        self._best, self._best_cosine = state["best"], state["best_cosine"]
        self._worse, self.stopped = state["worse"], state["stopped"]
        set_generators(state["positions"][self.ranks.rank]["now"])

    def _measured(self) -> dict[str, float]:
        """On the held-out images, where it is time to; sets `stopped`."""
        due = self.step % self.config.check_every == 0 or self.step == self.total
        if not (self._held_out and self._witnesses and due):
            return {}
        model: Any = self.model if self._average is None else self._average.module
        share_buffers(model)
        proxy = measure(model, self._witnesses, self._held_out, self.config.temperature)
        if self.config.patience is not None:
            if proxy.gradient_cosine > self._best_cosine:
                self._best_cosine, self._worse = proxy.gradient_cosine, 0
                self._best = copy.deepcopy(model.state_dict())
            else:
                self._worse += 1
            self.stopped = self._worse >= self.config.patience
        return {"held_out_kd": proxy.kd, "gradient_cosine": proxy.gradient_cosine}


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0: running statistics are of the images that a rank has seen."""
    if current().world > 1:
        for buffer in model.buffers():
            whole = buffer.contiguous()
            dist.broadcast(whole, 0)
            buffer.copy_(whole)


def _optimizer(parameters: list[nn.Parameter], config: AlignConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )


def _schedule(optimizer: torch.optim.Optimizer, total: int, config: AlignConfig) -> LRScheduler:
    if config.warmup >= total:
        raise ValueError(f"warmup: got {config.warmup} of {total} steps; allowed are fewer than all")

    def main() -> LRScheduler:
        if config.schedule == "constant":
            return ConstantLR(optimizer, factor=1.0)
        return CosineAnnealingLR(optimizer, total - config.warmup)

    if not config.warmup:
        return main()
    rising = LinearLR(optimizer, start_factor=FIRST_SHARE, total_iters=config.warmup)
    return SequentialLR(optimizer, [rising, main()], milestones=[config.warmup])


def _read(pending: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"cls": None, "kd": None}
    entry |= {name: float(value) if isinstance(value, Tensor) else value for name, value in pending.items()}
    return entry


def _refuse_non_finite(entry: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if not math.isfinite(entry[name]):
            raise FloatingPointError(
                f"{name}: {float(entry[name])} at step {entry['step']}, {where}, of learning rate {entry['lr']:.3g}; "
                "a lower lr or clip_norm may help"
            )
