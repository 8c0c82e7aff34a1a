# SPDX-License-Identifier: MIT
"""Which backward passes are those of a loss that a gradient scaler has multiplied."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

# While something watches, `scale` of torch's scalers marks what it returns. What their own `scale`
# was, by class; and how many watch.
_originals: dict[Any, Callable[..., Any]] = {}
_watchers = 0
_lock: Final = threading.Lock()


class _ScaledPass:
    """A backward pass through a scaled loss. Alive as long as it: autograd alone refers to it."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler
        # Checkpoints start passes in a pass, of other numbers, on the same thread; GPUs' parts of a
        # pass run on threads of their own, under the same number.
        self.task = torch._C._current_graph_task_id()
        self.thread = threading.get_ident()

    def __call__(self) -> None:
        """Do nothing when the pass is over."""


_passes: weakref.WeakSet[_ScaledPass] = weakref.WeakSet()


def require_unscaled() -> None:
    """Refuse to step in a backward pass of a scaled loss.

    Raises
    ------
    ValueError
        This is one.
    """
    if not _passes:
        return
    task, thread = torch._C._current_graph_task_id(), threading.get_ident()
    for scaled in list(_passes):
        if task == scaled.task or thread == scaled.thread:
            raise ValueError(
                "steps in the backward pass need a loss that no GradScaler has scaled, since they "
                "come before it can unscale the gradients: compute in bfloat16, which needs no "
                "GradScaler, or call remove() of the attachment and scaler.step(optimizer). "
                f"Received: a loss scaled by {scaled.scaler.get_scale():g}"
            )


def watch() -> None:
    """Recognise the passes of losses that are scaled from now on, until `unwatch`."""
    global _watchers
    with _lock:
        _watchers += 1
        for scaler in _classes(torch.amp.GradScaler):
            # ShardedGradScaler has a method of its own.
            if "scale" in vars(scaler) and scaler not in _originals:
                _originals[scaler] = scaler.scale
                scaler.scale = _marking(scaler.scale)


def unwatch() -> None:
    """End what one call of `watch` began."""
    global _watchers
    with _lock:
        _watchers -= 1
        if not _watchers:
            for scaler, scale in _originals.items():
                scaler.scale = scale
            _originals.clear()


def _classes(of: Any) -> Iterable[Any]:
    yield of
    for derived in of.__subclasses__():
        yield from _classes(derived)


def _marking(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def marking(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        return _marked(scaled, scaler) if scaler.is_enabled() else scaled

    return marking


def _marked(outputs: Any, scaler: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        if outputs.requires_grad:
            register: Any = outputs.register_hook  # without annotations in torch
            register(lambda _: _note_pass(scaler))
        return outputs
    if isinstance(outputs, (list, tuple)):
        for output in outputs:
            _marked(output, scaler)
        return outputs
    return (_marked(output, scaler) for output in outputs)


def _note_pass(scaler: Any) -> None:
    scaled = _ScaledPass(scaler)
    _passes.add(scaled)
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(scaled)
