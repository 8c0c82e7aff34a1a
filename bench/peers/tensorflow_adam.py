# SPDX-License-Identifier: MIT
"""TensorFlow's own Adam kernel, `ResourceApplyAdam`, for all variables in one graph.

The optimizers of TensorFlow 2 before Keras 3 call it like this
(`tf_keras.optimizers.legacy.Adam`).
https://www.tensorflow.org/api_docs/python/tf/raw_ops/ResourceApplyAdam
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from peers import Array, Contender, Work


def tensorflow() -> Any:
    """Import TensorFlow without its log messages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    return tf


def set_tensorflow_threads(threads: int) -> None:
    """Set the size of both of TensorFlow's thread pools."""
    threading = tensorflow().config.threading
    # TensorFlow only allows a change before the first operation.
    if threading.get_intra_op_parallelism_threads() != threads:
        threading.set_intra_op_parallelism_threads(threads)
        threading.set_inter_op_parallelism_threads(threads)


def assigns_to(variables: Iterable[Any]) -> Callable[[Iterable[Array]], None]:
    """Return a function that assigns gradients to these variables."""

    def assign(grads: Iterable[Array]) -> None:
        for variable, values in zip(variables, grads, strict=True):
            variable.assign(values)

    return assign


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    set_tensorflow_threads(threads)
    tf = tensorflow()
    params = [tf.Variable(array) for array in work.params()]
    grads = [tf.Variable(array) for array in work.grads()]
    m = [tf.Variable(tf.zeros_like(param)) for param in params]
    v = [tf.Variable(tf.zeros_like(param)) for param in params]
    iterations = tf.Variable(0, dtype=tf.int64)

    def step() -> None:
        t = tf.cast(iterations.assign_add(1), work.dtype)
        lr, beta_1, beta_2, epsilon = (
            tf.constant(value, work.dtype) for value in vars(work.hyper).values()
        )
        scalars = {"lr": lr, "beta1": beta_1, "beta2": beta_2, "epsilon": epsilon}
        scalars |= {"beta1_power": tf.pow(beta_1, t), "beta2_power": tf.pow(beta_2, t)}
        for param, grad, first, second in zip(params, grads, m, v, strict=True):
            handles = {"var": param.handle, "m": first.handle, "v": second.handle}
            tf.raw_ops.ResourceApplyAdam(**handles, **scalars, grad=grad.read_value())

    graph = tf.function(step, autograph=False)  # without results, it returns when it has completed

    def take() -> object:
        return graph(), m, v, iterations  # the graph does not keep its variables alive

    arrays: Callable[[], list[Array]] = lambda: [param.numpy() for param in params]
    return dict.fromkeys(names, Contender("hat", take, assigns_to(grads), arrays))
