# SPDX-License-Identifier: MIT
"""TensorFlow's own Adam kernel, `ResourceApplyAdam`, for all variables in one graph.

The optimizers of TensorFlow 2 before Keras 3 call it like this
(`tf_keras.optimizers.legacy.Adam`).
https://www.tensorflow.org/api_docs/python/tf/raw_ops/ResourceApplyAdam
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from peers import Array, Contender, Work, most_tensors

if TYPE_CHECKING:
    import tensorflow as tf

# Building the graph of ten times as many takes a minute.
MOST_TENSORS = 1_000


def versions() -> dict[str, str]:
    """Import TensorFlow and return its version."""
    return {"tensorflow": str(tensorflow().__version__)}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Reject more tensors than a graph can be built for in a few seconds."""
    return most_tensors(work, MOST_TENSORS, "10,000 take a minute to build a graph of")


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    set_threads(threads)
    return {name: ResourceApplyAdam(work) for name in names}


def tensorflow() -> Any:
    """Import TensorFlow without its log messages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    return tf


def set_threads(threads: int) -> None:
    """Set the size of both of TensorFlow's thread pools."""
    threading = tensorflow().config.threading
    # TensorFlow only allows a change before the first operation.
    if threading.get_intra_op_parallelism_threads() != threads:
        threading.set_intra_op_parallelism_threads(threads)
        threading.set_inter_op_parallelism_threads(threads)


class ResourceApplyAdam(Contender):
    """A graph that increments the step and updates all variables."""

    form = "hat"

    def __init__(self, work: Work) -> None:
        tf = tensorflow()
        self._params = [tf.Variable(array) for array in work.params()]
        self._grads = [tf.Variable(array) for array in work.grads()]
        m = [tf.Variable(tf.zeros_like(param)) for param in self._params]
        v = [tf.Variable(tf.zeros_like(param)) for param in self._params]
        iterations = tf.Variable(0, dtype=tf.int64)
        hyper = work.hyper

        def step() -> None:
            t = tf.cast(iterations.assign_add(1), work.dtype)
            lr, beta_1, beta_2, epsilon = (
                tf.constant(value, work.dtype)
                for value in (hyper.lr, hyper.beta_1, hyper.beta_2, hyper.epsilon)
            )
            powers = {"beta1_power": tf.pow(beta_1, t), "beta2_power": tf.pow(beta_2, t)}
            for param, grad, first, second in zip(self._params, self._grads, m, v, strict=True):
                tf.raw_ops.ResourceApplyAdam(
                    var=param.handle,
                    m=first.handle,
                    v=second.handle,
                    lr=lr,
                    beta1=beta_1,
                    beta2=beta_2,
                    epsilon=epsilon,
                    grad=grad.read_value(),
                    **powers,
                )

        self._variables = (m, v, iterations)
        self._step = tf.function(step, autograph=False)

    def step(self) -> object:
        """Take a step. A `tf.function` without results returns when it has completed."""
        return self._step()

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Assign arrays to the gradients."""
        assign(self._grads, grads)

    def params(self) -> list[Array]:
        """Return copies of the parameters."""
        return [param.numpy() for param in self._params]


def assign(variables: list[tf.Variable], arrays: Iterable[Array]) -> None:
    """Assign arrays to variables."""
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
