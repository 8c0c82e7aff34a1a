# SPDX-License-Identifier: MIT
"""Detection of backward passes of losses that a GradScaler has scaled."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

# While there are watchers, `scale` of torch's GradScaler classes is replaced by one that marks its
# results. `_originals` has the replaced methods by class.
_originals: dict[Any, Callable[..., Any]] = {}
_watchers = 0
_lock: Final = threading.Lock()


class _ScaledPass:
    """A running backward pass of a scaled loss; only autograd refers to it, until the pass ends."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler
        # Activation checkpointing runs nested passes, with other IDs but on the same thread. GPU
        # parts of a pass run on other threads, but with the same ID.
        self.task = torch._C._current_graph_task_id()
        self.thread = threading.get_ident()

    def __call__(self) -> None:
        """Do nothing; autograd calls this at the end of the pass."""


_passes: weakref.WeakSet[_ScaledPass] = weakref.WeakSet()


def require_unscaled() -> None:
    """Raise ValueError within a backward pass of a scaled loss."""
    if not _passes:
        return
    task, thread = torch._C._current_graph_task_id(), threading.get_ident()
    for scaled in list(_passes):
        if task == scaled.task or thread == scaled.thread:
            raise ValueError(
                "steps in the backward pass need a loss that no GradScaler has scaled, since it "
                "unscales gradients only after the pass: compute in bfloat16, which needs no "
                "GradScaler, or call remove() of the attachment and scaler.step(optimizer). "
                f"Received: a loss scaled by {scaled.scaler.get_scale():g}"
            )


def watch() -> None:
    """Detect passes of losses that are scaled from now on, until `unwatch`."""
    global _watchers
    with _lock:
        _watchers += 1
        for scaler in _classes(torch.amp.GradScaler):
            _mark_losses_of(scaler)


def _mark_losses_of(scaler: Any) -> None:
    # Subclasses such as ShardedGradScaler may override `scale`.
    if "scale" in vars(scaler) and scaler not in _originals:
        _originals[scaler] = scaler.scale
        scaler.scale = _marking(scaler.scale)


def unwatch() -> None:
    """Undo one call of `watch`."""
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
            register: Any = outputs.register_hook  # not annotated in torch
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
