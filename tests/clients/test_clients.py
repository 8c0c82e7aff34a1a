# SPDX-License-Identifier: MIT
"""Trainers for torch's optimizers, with ours: the steps of torch's, and trainings that go on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from lockstep import FORMATS, assert_learnt, assert_same_training, beside_torch
from torch_helpers import assert_everything_same_bits, everything

# Of those clients that raise warnings themselves.
may_warn = pytest.mark.filterwarnings("default")
each_format = pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)


def network(dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model.to(getattr(torch, dtype))


def rows(seed: int, dtype: str = "float32", count: int = 4) -> Any:
    drawn = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return drawn.to(getattr(torch, dtype))


def loss_of(model: Any, x: Any) -> Any:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


# -- accelerate: gradient accumulation, gradient clipping and a schedule --------------------------


class Accelerated:
    def __init__(self, kind: Any, dtype: str = "float32") -> None:
        accelerate: Any = pytest.importorskip("accelerate")
        model = network(dtype)
        self.inner = kind(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.inner, 0.9)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, self.inner, schedule
        )
        self.dtype = dtype
        self.losses: list[Any] = []

    def run(self, first: int, last: int) -> Any:
        for i in range(first, last):
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model, rows(i, self.dtype))
                self.losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self.inner


def test_accelerate() -> None:
    beside_torch(AdamW, lambda kind: Accelerated(kind).run(0, 12))


@each_format
def test_accelerate_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = (Accelerated(partial(AdamW, **formats), dtype) for _ in range(2))
    whole.run(0, 20)
    whole.accelerator.save_state(str(tmp_path))
    resumed.accelerator.load_state(str(tmp_path))
    assert_same_training(resumed.run(20, 40), whole.run(20, 40))
    assert_learnt(whole.inner, whole.losses, dtype)


# -- DeepSpeed: ZeRO stage 2, which steps flat float32 copies -------------------------------------


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    deepspeed: Any = pytest.importorskip("deepspeed")
    monkeypatch.setenv("LOCAL_RANK", "0")
    # Otherwise DeepSpeed first compiles its shared-memory communication for minutes.
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    store = (tmp_path / "store").as_uri()
    alone = {"auto_mpi_discovery": False, "rank": 0, "world_size": 1}
    deepspeed.init_distributed("gloo", init_method=store, **alone)
    yield
    deepspeed.comm.destroy_process_group()


class Zero:
    def __init__(self, kind: Any, dtype: str) -> None:
        deepspeed: Any = pytest.importorskip("deepspeed")
        model = network()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.inner = kind(model.parameters(), lr=0.01)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.inner, config=config)
        self.dtype = dtype

    def run(self, first: int, last: int) -> Any:
        for i in range(first, last):
            self.engine.backward(loss_of(self.engine, rows(i, self.dtype)))
            self.engine.step()
        return self.inner


@may_warn
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeed(dtype: str, tmp_path: Path) -> None:
    beside_torch(AdamW, lambda kind: Zero(kind, dtype).run(0, 12))
    whole, resumed = Zero(AdamW, dtype), Zero(AdamW, dtype)
    whole.run(0, 6)
    whole.engine.save_checkpoint(str(tmp_path))
    resumed.engine.load_checkpoint(str(tmp_path))
    assert_everything_same_bits(everything(resumed.run(6, 12)), everything(whole.run(6, 12)))


# -- lightning, which passes the training step to `step` as a closure -----------------------------


def fit(
    kind: Any, directory: Path, epochs: int, *, precision: Any = "32-true", resume: Any = None
) -> Any:
    lightning: Any = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()
            self.losses: list[Any] = []

        def training_step(self, x: Any) -> Any:
            loss = loss_of(self.layers, x)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = kind(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        logger=False,
        max_epochs=epochs,
        precision=precision,
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(rows(0, count=12), 4), ckpt_path=resume)
    return trainer


@may_warn
def test_lightning(tmp_path: Path) -> None:
    beside_torch(AdamW, lambda kind: fit(kind, tmp_path, 2))


@may_warn
@each_format
def test_lightning_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    precision = "bf16-true" if dtype == "bfloat16" else "32-true"
    run = partial(fit, partial(AdamW, **formats), tmp_path, precision=precision)
    run(8).save_checkpoint(tmp_path / "half.ckpt")
    whole = run(16)
    assert_learnt(whole.optimizers[0], whole.model.losses, dtype)
    resumed = run(16, resume=tmp_path / "half.ckpt")
    assert_same_training(resumed.optimizers[0], whole.optimizers[0])


# -- peft: LoRA, with an optimizer over all parameters, of which the base model's are frozen ------


def adapted(dtype: str = "float32", **options: Any) -> Any:
    peft: Any = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    return peft.get_peft_model(network(dtype), config, **options)


def train(model: Any, optimizer: Any, first: int, last: int, dtype: str = "float32") -> list[Any]:
    losses = []
    for i in range(first, last):
        loss = loss_of(model, rows(i, dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def test_peft() -> None:
    def client(kind: Any) -> Any:
        model = adapted()
        optimizer = kind(model.parameters(), lr=0.01)
        train(model, optimizer, 0, 6)
        return optimizer, model

    optimizer, model = beside_torch(AdamW, client)
    assert list(optimizer.state) == [p for p in model.parameters() if p.requires_grad]
    frozen = model.unload().state_dict()
    torch.testing.assert_close(frozen, network().state_dict(), rtol=0, atol=0)


@each_format
def test_peft_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    # By default, peft keeps the adapter of a bfloat16 model in float32.
    options: dict[str, Any] = {"autocast_adapter_dtype": False}
    model = adapted(dtype, **options)
    whole = AdamW(model.parameters(), lr=0.01, **formats)
    assert_learnt(whole, train(model, whole, 0, 40, dtype), dtype)
    model.save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
    base = network(dtype)
    restored = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True, **options)
    resumed = AdamW(restored.parameters(), lr=0.01)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for each, optimizer in ((model, whole), (restored, resumed)):
        train(each, optimizer, 40, 50, dtype)
    assert_same_training(resumed, whole)


# -- stable-baselines3, which creates the optimizer from a class in `policy_kwargs` ---------------


def test_stable_baselines3(tmp_path: Path) -> None:
    stable_baselines3: Any = pytest.importorskip("stable_baselines3")

    def learn(kind: Any) -> Any:
        policy = {"net_arch": [8], "optimizer_class": kind, "optimizer_kwargs": {"eps": 1e-5}}
        sizes = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
        game = ("MlpPolicy", "CartPole-v1")
        model = stable_baselines3.PPO(*game, policy_kwargs=policy, seed=0, device="cpu", **sizes)
        return model.learn(64)

    model = beside_torch(Adam, learn)
    model.save(tmp_path / "model")
    restored = stable_baselines3.PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    for each in (model, restored):
        each.set_random_seed(1)
        each.learn(32)
    assert type(restored.policy.optimizer) is Adam
    ours, theirs = (everything(each.policy.optimizer) for each in (restored, model))
    assert_everything_same_bits(ours, theirs)


# -- transformers' Trainer with a given optimizer -------------------------------------------------


def fine_tuned(
    kind: Any, directory: Path, *, dtype: str = "float32", resume: Path | None = None
) -> tuple[Any, list[float]]:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    optimizer = kind(model.parameters(), lr=0.01)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        logging_steps=1,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
    )
    texts = torch.arange(24 * 8).reshape(24, 8) % 29
    dataset = [{"input_ids": ids, "labels": ids} for ids in texts]
    optimizers = (optimizer, None)
    trainer = transformers.Trainer(model, arguments, train_dataset=dataset, optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return optimizer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_transformers(tmp_path: Path) -> None:
    beside_torch(AdamW, lambda kind: fine_tuned(kind, tmp_path))


@each_format
def test_transformers_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    run = partial(fine_tuned, partial(AdamW, **formats), dtype=dtype)
    whole, losses = run(tmp_path)
    assert_learnt(whole, losses, dtype)
    resumed, _ = run(tmp_path / "resumed", resume=tmp_path / "checkpoint-3")
    assert_same_training(resumed, whole)
