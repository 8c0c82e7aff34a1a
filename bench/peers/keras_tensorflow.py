# SPDX-License-Identifier: MIT
"""Keras 3 on TensorFlow: `keras.optimizers.Adam.apply` in a graph compiled by XLA.

`Model.compile` has the default `jit_compile="auto"`, which selects XLA on TensorFlow even without a
GPU. https://keras.io/api/models/model_training_apis/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peers import Contender, Work, most_tensors
from peers.keras_adam import KerasStep, keras, optimizer
from peers.tensorflow_adam import set_threads, tensorflow

# XLA takes half a minute to compile the step of this many tensors.
MOST_TENSORS = 1_000


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    return {
        "keras": str(keras("tensorflow").__version__),
        "tensorflow": str(tensorflow().__version__),
    }


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Reject more tensors than XLA compiles in half a minute."""
    return most_tensors(work, MOST_TENSORS, "1,000 take half a minute to compile")


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    set_threads(threads)
    return {name: KerasTensorFlowStep(work) for name in names}


class KerasTensorFlowStep(KerasStep):
    """`apply` within `tf.function`."""

    scalars = "float32"  # this backend rounds Python constants to float32

    def __init__(self, work: Work) -> None:
        tf = tensorflow()
        variable: Any = keras("tensorflow").Variable
        self._params = [variable(array, dtype=work.dtype) for array in work.params()]
        self._grads = [tf.Variable(array) for array in work.grads()]
        adam = optimizer(work, self._params)

        def step() -> None:
            adam.apply([grad.read_value() for grad in self._grads], self._params)

        self._step = tf.function(step, reduce_retracing=True, jit_compile=True)

    def set_grad(self, index: int, values: Any) -> None:
        """Assign an array to a gradient."""
        self._grads[index].assign(values)
