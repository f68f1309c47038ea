"""Steps of an attack recorded once and replayed, so that the host launches one graph a step instead of every kernel."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor, nn

from alignfast.attacks.state import State

# Moves a state by one step, which may be the last.
Step = Callable[[State, bool], None]
# Does again, on the same tensors, what was recorded.
Replay = Callable[[], object]
# Records a call without arguments on a device; may call it before, to warm up.
Capture = Callable[[Callable[[], None], torch.device], Replay]

WARM_UPS = 3
# Full batches and a last, smaller one, of images of two sizes.
MOST_KEPT = 4


@dataclass(frozen=True)
class Recorded:
    """A step and the last step, on the buffers of `state`. fixed: see `_fixed`."""

    state: State
    step: Replay
    last: Replay
    fixed: Hashable


class Graphs:
    """The recorded steps of one attack, by the shape of the images, the least recently used first.

    A copy, as of an attack that is copied or pickled, begins without any.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def run(self, source: nn.Module, start: State, step: Step, steps: int, capture: Capture) -> Tensor:
        """The adversarial images after `steps` replays from `start`, which stays as it is."""
        # Two threads must not share the buffers of a graph between the copy in and the copy out.
        with self._lock:
            recorded = self._recorded(source, start, step, capture)
            recorded.state.copy_(start)
            for _ in range(steps - 1):
                recorded.step()
            recorded.last()
            return recorded.state.adv.clone()

    def _recorded(self, source: nn.Module, start: State, step: Step, capture: Capture) -> Recorded:
        images, fixed = start.images, _fixed(source, start.images.device)
        # Work on one stream is in order, so that a graph's buffers are free when it is launched there again.
        key = (images.shape, images.stride(), images.dtype, images.device, _stream(images.device))
        recorded = self._kept.get(key)
        if recorded is None or recorded.fixed != fixed:
            recorded = self._kept[key] = _record(start.clone(), step, capture, fixed)
        self._kept.move_to_end(key)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return recorded


def _record(state: State, step: Step, capture: Capture, fixed: Hashable) -> Recorded:
    device = state.images.device
    middle = capture(partial(step, state, False), device)
    # An estimator that keeps nothing has nothing to leave out at the last step.
    last = capture(partial(step, state, True), device) if state.estimator else middle
    return Recorded(state, middle, last, fixed)


def _fixed(source: nn.Module, device: torch.device) -> Hashable:
    """What is recorded besides the state: where the tensors of the model lie, and torch's settings for arithmetic."""
    tensors = [*source.parameters(), *source.buffers()]
    return (
        tuple((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# torch allows one capture at a time in a process.
_CAPTURING = Lock()
# Graphs launched on one stream never run at the same time and leave nothing behind in the memory of their intermediate
# results, so that one pool serves them all.
_SHARING_POOL: defaultdict[Hashable, WeakSet[torch.cuda.CUDAGraph]] = defaultdict(WeakSet)


def capture_cuda(step: Callable[[], None], device: torch.device) -> Replay:
    """The replay of a CUDA graph of `step`, which runs a few times first.

    Raises:
        RuntimeError: the step cannot be captured; its cause is what CUDA refused.
    """
    with _CAPTURING, torch.cuda.device(device), _uncached_autocast():
        side, current = _side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        # Workspaces and tuned algorithms come into being outside the capture, but on its stream, to which they belong.
        with torch.cuda.stream(side), torch.random.fork_rng([device]):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(side)
        sharing = _SHARING_POOL[device, current.cuda_stream]
        graph = _captured(step, side, next(iter(sharing), None))
        sharing.add(graph)
        return graph.replay


def _captured(
    step: Callable[[], None], stream: torch.cuda.Stream, other: torch.cuda.CUDAGraph | None
) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), None if other is None else other.pool()
    try:
        # torch leaves its capture stream current where a capture fails; the outer context takes that back. A loader's
        # thread may pin memory meanwhile, which the mode "global" would take for an error.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
    except Exception as error:
        raise RuntimeError(
            f"cuda_graph: the step cannot be captured in a CUDA graph ({_reason(error)}); allowed is a model that "
            "neither waits for the device nor copies from the host, or cuda_graph=False"
        ) from error
    return graph


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: the end of a failed capture raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _uncached_autocast() -> torch.autocast:
    """Autocast as it is, without its cache: a cached weight would lie in the memory of the graph."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# How steps are recorded, by type of device; elsewhere each is run anew.
CAPTURES: dict[str, Capture] = {"cuda": capture_cuda}
