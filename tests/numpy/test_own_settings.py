# SPDX-License-Identifier: MIT
"""`Adam.override`: settings of single parameters, in steps, copies and files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import assert_all_same_bits, halving
from training import Training

OWN: list[tuple[dict[int, dict[str, Any]], dict[str, Any]]] = [
    ({0: {"lr": 0.5}, 2: {"lr": 0.25}, 3: {"lr": 0.5}}, {}),
    ({1: {"lr": 0.5}}, {"lr": halving, "decay": 0.5}),
    ({0: {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 0.1}}, {"amsgrad": True}),
    ({1: {"weight_decay": None}, 2: {"weight_decay": 0.5, "l2": 0.1}}, {"weight_decay": 0.1}),
    ({0: {"clipvalue": 0.01}, 1: {"clipnorm": None}, 3: {"lr": 0.5}}, {"clipnorm": 0.1}),
    ({0: {"clipnorm_per_tensor": 0.1}}, {"gradient_accumulation_steps": 2}),
    ({1: {"ema_momentum": 0.5, "ema_overwrite_frequency": 2}}, {"use_ema": True}),
    ({0: {"maximize": True}, 1: {"bias_corrected_epsilon": True}}, {"loss_scale": 8.0}),
    ({0: {"flush_denormals": False}, 1: {"decay": 1.0}}, {"zero_grad": True}),
]


@pytest.mark.parametrize(("own", "options"), OWN, ids=str)
def test_own_settings_equal_oracle(
    path: Path, own: dict[int, dict[str, Any]], options: dict[str, Any]
) -> None:
    training = Training(own=own, excluded=[2], **options)
    grads = training.grads()
    clipped = training.optimizer.get_gradients(grads, training.params)
    assert_all_same_bits(clipped, training.reference.gradients(grads), "get_gradients")
    training.step(3)
    training.check()
    training = training.resumed(path)
    training.step(2)
    training.optimizer = pickle.loads(pickle.dumps(training.optimizer))
    training.step(2)
    training.check()


def test_a_later_call_changes_what_it_names() -> None:
    training = Training(own={0: {"lr": 0.5, "decay": 0.5}})
    adam, own = training.optimizer, training.reference.own
    training.step()
    adam.override(training.params[0], learning_rate=0.25)
    adam.override({"a": training.params[1]}, l2=0.5)
    own.update({0: {"lr": 0.25, "decay": 0.5}, 1: {"l2": 0.5}})
    training.step(2)
    training.check()
    adam.override(iter(training.params[:1]))  # removes them
    del own[0]
    training.step()
    training.check()


OF_THE_STEP = ("amsgrad", "use_ema", "gradient_accumulation_steps", "skip_nonfinite", "zero_grad")
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0.1, "learning_rate": 0.1}, TypeError, "^lr and learning_rate are the same"),
    ({"clipnorm_per_tensor": 1.0}, ValueError, "exclude each other"),
    *(({name: 2}, ValueError, f"^{name} concerns the step as a whole") for name in OF_THE_STEP),
]


@pytest.mark.parametrize(("settings", "error", "words"), REFUSED, ids=str)
def test_settings_that_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    training = Training(clipnorm=1.0)
    training.step()
    with pytest.raises(error, match=words):
        training.optimizer.override(training.params, **settings)
    training.step()
    training.check()


def test_parameters_that_the_optimizer_lacks(path: Path) -> None:
    training = Training()
    training.step()
    adam = training.optimizer
    adam.override([np.ones(3)], lr=0.5)
    with pytest.raises(ValueError, match=r"^override\(params\) must name .*params\[0\]"):
        adam.step(training.params, training.grads())
    training.check()
    with pytest.raises(ValueError, match=r"before save.*Received: 1 parameters"):
        adam.save(path)
    adam.override()
    training.step()
    training.check()


def test_settings_of_all_parameters_are_taken_back(path: Path) -> None:
    training = Training(own={0: {"lr": 0.5}, 3: {"decay": 0.5}}, excluded=[1], weight_decay=0.1)
    adam = training.optimizer
    training.step()
    adam.override()
    adam.exclude_from_weight_decay([])
    training.reference.own.clear()
    training.reference.excluded.clear()
    loaded = training.resumed(path)  # as if saved without a step in between
    for each in (training, loaded):
        each.step()
        each.check()
    with pytest.raises(TypeError, match=r"^params must be given .* Received: lr, l2$"):
        adam.override(lr=0.5, l2=0.5)
    adam.build(training.params[:1])
    adam.save(path)


def test_a_refused_step_leaves_own_settings_as_they_were() -> None:
    training = Training(own={0: {"lr": 0.5}, 1: {"clipnorm_per_tensor": 1.0}})
    training.step()
    adam = training.optimizer
    adam.beta_1, adam.clipnorm = 0.5, 1.0
    with pytest.raises(ValueError, match="clipnorm and clipnorm_per_tensor exclude each other"):
        adam.step(training.params, training.grads())
    adam.beta_1, adam.clipnorm = 0.9, None
    training.step()
    training.check()


# -- loading into an optimizer ------------------------------------------------------------------


def test_load_into_an_optimizer(path: Path) -> None:
    training = Training(lr=0.25, own={0: {"lr": 0.5}}, amsgrad=True)
    training.step(2)
    training.optimizer.save(path)
    other = Adam(lr=halving, use_ema=True)
    other.apply_gradients([(np.ones(2), np.ones(2))])
    assert other.load(path, training.params) is other
    assert other.get_config() == training.optimizer.get_config()
    training.optimizer = other
    training.step()
    training.check()
    # If it fails, the optimizer is as it was.
    saved = Adam(beta_1=0.5)
    saved.build({"a": np.ones(3)})
    saved.save(path)
    with pytest.raises(ValueError, match=r"^params\['a'\] must have the shape"):
        other.load(path, {"a": np.ones(4)})
    training.step()
    training.check()


def test_schedule_of_the_optimizer_is_used(path: Path) -> None:
    param, adam = np.ones(3), Adam(lr=lambda iterations: 0.5**iterations)
    adam.build(param)
    adam.save(path)
    for lr in (None, 0.5):
        with pytest.raises(ValueError, match=r"lr must be given .*load\(path, params, lr=schedule"):
            Adam.load(path, param, lr=lr)
    with pytest.raises(TypeError, match="the same argument"):
        Adam.load(path, param, lr=halving, learning_rate=halving)
    assert Adam.load(path, param, learning_rate=halving).lr is halving
    assert adam.load(path, param).lr is adam.lr
    assert Adam(lr=halving).load(path, param).lr is halving
