# SPDX-License-Identifier: MIT
"""The optimizer's share of the time of a training, with and without fusedadam.

A small network learns handwritten digits: 1,797 scans of 8 x 8 pixels, which come with
scikit-learn. It is trained in NumPy with hand-written backpropagation, and in torch with autograd.
Each framework has its own process, in which its optimizers are interleaved, epoch by epoch. All
trainings have the same initial weights, batches and hyper-parameters. A training that recognizes
less than 95 % of the test digits is an error.

- numpy: "numpy formula" is the baseline for "fusedadam"
- torch: "torch default" (`torch.optim.Adam`) is the baseline for "fusedadam" on the same kind of
  tensors, and for "torch fused"
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import child
import numpy as np
import numpy.typing as npt
from settings import Results, Settings, Tick

if TYPE_CHECKING:
    import torch

TITLE = "A training, end to end"

Array: TypeAlias = npt.NDArray[Any]

LAYERS = (64, 512, 256, 10)  # units; 167,562 parameters
BATCH = 64
# At least so many that each network has learned; one per round if there are more rounds.
EPOCHS = 15
QUICK_EPOCHS = 5
REQUIRED_ACCURACY = 0.95
LR, BETA_1, BETA_2, EPSILON = 0.001, 0.9, 0.999, 1e-8
SEED = 1

# Framework -> modules that it needs.
NEEDS = {
    "numpy": ("sklearn", "threadpoolctl"),
    "torch": ("sklearn", "threadpoolctl", "torch"),
}


class Samples(NamedTuple):
    """Images, one per row with pixels in [0, 1], and their digits."""

    images: Array
    digits: Array


class Seconds(NamedTuple):
    """The times of the two parts of all steps of an epoch."""

    gradients: float
    optimizer: float


def epochs(settings: Settings) -> int:
    """Return the number of epochs of each training. An epoch is a round."""
    return max(QUICK_EPOCHS if settings.quick else EPOCHS, settings.rounds)


def ticks(settings: Settings) -> int:  # noqa: ARG001 - the interface of all sections
    """One per framework."""
    return len(NEEDS)


def run(settings: Settings, tick: Tick) -> Results:
    """Train in each framework that is installed."""
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    for framework, modules in NEEDS.items():
        reason = child.absence(*modules)
        if reason is not None:
            not_run[f"training in {framework}"] = reason
        else:
            rows += child.call(train_all, framework, settings.threads, epochs(settings))
        tick(framework)
    return {"rows": rows, "not_run": not_run}


# ---- in a process of its own -------------------------------------------------------------------


def train_all(framework: str, threads: int, passes: int) -> list[dict[str, Any]]:
    """Train with each optimizer of a framework, and return a row for each."""
    import fusedadam
    from threadpoolctl import threadpool_limits

    fusedadam.set_num_threads(threads)
    if framework == "torch":
        import torch

        torch.set_num_threads(threads)
    trainings = NUMPY_TRAININGS if framework == "numpy" else TORCH_TRAININGS
    train, test = load_splits()
    with threadpool_limits(limits=threads, user_api="blas"):
        contenders = {name: make(initial_params()) for name, make in trainings.items()}
        seconds: dict[str, list[Seconds]] = {name: [] for name in contenders}
        order = np.random.default_rng(SEED)
        for _ in range(passes):
            rows = order.permutation(len(train.digits))
            for name, training in contenders.items():
                seconds[name].append(train_epoch(training, train, rows))
        accuracies = {name: accuracy(training, test) for name, training in contenders.items()}
    for name, reached in accuracies.items():
        if reached < REQUIRED_ACCURACY:
            raise RuntimeError(
                f"a training must reach an accuracy of {REQUIRED_ACCURACY}, or it was none. "
                f"Received: {reached:.3f} with {name} in {framework}"
            )
    return [
        {
            "framework": framework,
            "optimizer": name,
            "threads": threads,
            "parameters": sum(param.size for param in initial_params()),
            "batch": BATCH,
            # Per epoch.
            "gradient_seconds": [epoch.gradients for epoch in seconds[name]],
            "optimizer_seconds": [epoch.optimizer for epoch in seconds[name]],
            "accuracy": accuracies[name],
        }
        for name in contenders
    ]


def load_splits() -> tuple[Samples, Samples]:
    """Return the training and test split: four fifths and one fifth of the scans of each digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, digits = load_digits(return_X_y=True)
    images = (images / images.max()).astype(np.float32)
    train_images, test_images, train_digits, test_digits = train_test_split(
        images, digits, test_size=0.2, stratify=digits, random_state=SEED
    )
    return Samples(train_images, train_digits), Samples(test_images, test_digits)


def initial_params() -> list[Array]:
    """Return the weights and biases of each layer in turn.

    He et al. (arXiv:1502.01852) derive the standard deviation for layers with a rectifier.
    """
    random = np.random.default_rng(SEED)
    params = []
    for fan_in, fan_out in itertools.pairwise(LAYERS):
        spread = np.float32(np.sqrt(2 / fan_in))
        params.append(spread * random.standard_normal((fan_in, fan_out), dtype=np.float32))
        params.append(np.zeros(fan_out, dtype=np.float32))
    return params


class Training(ABC):
    """A network and its optimizer. The two parts of a step are timed separately."""

    @abstractmethod
    def find_gradients(self, images: Array, digits: Array) -> None:
        """Run the forward and backward pass of the mean cross-entropy."""

    @abstractmethod
    def step(self) -> object:
        """Update the parameters with these gradients."""

    @abstractmethod
    def params(self) -> Sequence[Array]:
        """Return the current parameters."""


def train_epoch(training: Training, samples: Samples, order: Array) -> Seconds:
    """Take one step per batch of samples in this order, and return the times."""
    gradients = optimizer = 0.0
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        images, digits = samples.images[rows], samples.digits[rows]
        begin = time.perf_counter()
        training.find_gradients(images, digits)
        middle = time.perf_counter()
        training.step()
        end = time.perf_counter()
        gradients += middle - begin
        optimizer += end - middle
    return Seconds(gradients, optimizer)


def accuracy(training: Training, samples: Samples) -> float:
    """Return the fraction of images whose digit is recognized."""
    scores = forward(training.params(), samples.images)[-1]
    return float(np.mean(scores.argmax(axis=1) == samples.digits))


# ---- in NumPy ----------------------------------------------------------------------------------


def forward(params: Sequence[Array], images: Array) -> list[Array]:
    """Return the inputs of each layer, and the scores of the last layer."""
    values = [images]
    for i in range(0, len(params), 2):
        weighted = values[-1] @ params[i] + params[i + 1]
        is_last = i + 2 == len(params)
        values.append(weighted if is_last else np.maximum(weighted, 0))
    return values


def backward(params: Sequence[Array], values: Sequence[Array], digits: Array) -> list[Array]:
    """Return the gradients of the mean cross-entropy, one per parameter array."""
    scores = values[-1]
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = exponentials / exponentials.sum(axis=1, keepdims=True)
    error[np.arange(len(digits)), digits] -= 1
    error /= len(digits)
    grads: list[Array] = [np.empty(0)] * len(params)
    for i in range(len(params) - 2, -1, -2):
        inputs = values[i // 2]
        grads[i] = inputs.T @ error
        grads[i + 1] = error.sum(axis=0)
        if i > 0:
            error = (error @ params[i].T) * (inputs > 0)
    return grads


class NumPyTraining(Training):
    """Hand-written backpropagation. Subclasses add the step."""

    def __init__(self, params: list[Array]) -> None:
        self._params = params
        self._grads: list[Array] = []

    def find_gradients(self, images: Array, digits: Array) -> None:
        """Run the forward and backward pass."""
        self._grads = backward(self._params, forward(self._params, images), digits)

    def params(self) -> Sequence[Array]:
        """Return the arrays themselves."""
        return self._params


class NumPyFormula(NumPyTraining):
    """Adam as usually written in plain NumPy, in place where that needs no extra code."""

    def __init__(self, params: list[Array]) -> None:
        super().__init__(params)
        self._m = [np.zeros_like(param) for param in params]
        self._v = [np.zeros_like(param) for param in params]
        self._t = 0

    def step(self) -> object:
        """Take a step."""
        self._t += 1
        lr_t = LR * math.sqrt(1 - BETA_2**self._t) / (1 - BETA_1**self._t)
        for p, g, m, v in zip(self._params, self._grads, self._m, self._v, strict=True):
            m *= BETA_1
            m += (1 - BETA_1) * g
            v *= BETA_2
            v += (1 - BETA_2) * g**2
            p -= lr_t * m / (np.sqrt(v) + EPSILON)
        return None


class NumPyFused(NumPyTraining):
    """The same step by `fusedadam.Adam`."""

    def __init__(self, params: list[Array]) -> None:
        from fusedadam import Adam

        super().__init__(params)
        self._adam = Adam(LR, BETA_1, BETA_2, EPSILON)

    def step(self) -> object:
        """Take a step."""
        return self._adam.apply_gradients(zip(self._grads, self._params, strict=True))


# ---- in torch ----------------------------------------------------------------------------------


class TorchTraining(Training):
    """Training with autograd. `make_step` returns the step over given parameters."""

    def __init__(
        self,
        params: list[Array],
        make_step: Callable[[list[torch.Tensor]], Callable[[], object]],
    ) -> None:
        import torch

        self._params = [torch.from_numpy(param).requires_grad_() for param in params]
        self._step = make_step(self._params)

    def find_gradients(self, images: Array, digits: Array) -> None:
        """Run the forward and backward pass."""
        import torch
        from torch.nn import functional

        for param in self._params:
            param.grad = None
        values = torch.from_numpy(images)
        for i in range(0, len(self._params), 2):
            values = values @ self._params[i] + self._params[i + 1]
            if i + 2 < len(self._params):
                values = functional.relu(values)
        loss = functional.cross_entropy(values, torch.from_numpy(digits))
        torch.autograd.backward([loss])

    def step(self) -> object:
        """Take a step."""
        return self._step()

    def params(self) -> Sequence[Array]:
        """Return views of the parameters as NumPy arrays."""
        return [param.detach().numpy() for param in self._params]


def torch_step(params: list[torch.Tensor], *, fused: bool) -> Callable[[], object]:
    """Return the step of `torch.optim.Adam`: the fused or the default implementation."""
    import torch

    betas = (BETA_1, BETA_2)
    choice = {"fused": True} if fused else {}
    step: Callable[[], object] = torch.optim.Adam(params, LR, betas, EPSILON, **choice).step
    return step


def fusedadam_step(params: list[torch.Tensor]) -> Callable[[], object]:
    """Return the step of `fusedadam.Adam` over torch tensors."""
    from fusedadam import Adam

    adam = Adam(LR, BETA_1, BETA_2, EPSILON)
    return lambda: adam.apply_gradients([(param.grad, param) for param in params])


# The first of each framework is the baseline.
NUMPY_TRAININGS: dict[str, Callable[[list[Array]], Training]] = {
    "numpy formula": NumPyFormula,
    "fusedadam": NumPyFused,
}
TORCH_TRAININGS: dict[str, Callable[[list[Array]], Training]] = {
    "torch default": lambda params: TorchTraining(params, lambda p: torch_step(p, fused=False)),
    "fusedadam": lambda params: TorchTraining(params, fusedadam_step),
    "torch fused": lambda params: TorchTraining(params, lambda p: torch_step(p, fused=True)),
}
