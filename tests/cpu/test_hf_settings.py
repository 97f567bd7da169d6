"""KeeplessCallback under the Trainer's settings: precision, accumulation, batch sizes, adapters, TRL, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

import torch
from hf_training import BATCH, LENGTH, Tokens, differences, llama, middle, run
from torch import nn

import keepless
from keepless.integrations.hf import KeeplessCallback
from keepless.integrations.hf_refusals import refuse_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning")


def both(tmp_path: Path, make: Any, callback: KeeplessCallback, **options: Any) -> KeeplessCallback:
    """Trains without and with the callback; the same bits, a plan that recomputes, a peak that is kept."""
    plain = run(tmp_path / "plain", make(), **options)
    ran = run(tmp_path / "kept", make(), [callback], **options)
    assert differences(plain, ran) == []
    assert torch.equal(plain.rng, ran.rng)
    assert callback.plan is not None
    assert callback.plan.num_replays > 0 or callback.plan.engine == "eager"
    assert callback.plan.recomputed_nbytes > 0
    assert callback.measured_peak is not None
    assert callback.measured_peak <= callback.plan.budget.limits["device"]
    return callback


@pytest.mark.slow
def test_bf16_with_accumulation_and_padding(tmp_path: Path) -> None:
    """Accelerate's autocast stands around the forward; gradients are added up; some batches have padding, which takes
    other ways through the masks."""
    callback = KeeplessCallback(middle(llama(), accumulate=True))
    both(tmp_path, llama, callback, bf16=True, gradient_accumulation_steps=2, data=Tokens(padded=True), eval_steps=4)
    assert callback.plan is not None
    assert callback.plan.signature["accumulate"] is True


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_measured_as_predicted(tmp_path: Path, accumulate: int) -> None:
    """The batches of a step, the one that was fetched ahead among them, are counted once, however many these are."""
    data = Tokens(masked=False, num=8 * BATCH * accumulate)
    callback = KeeplessCallback("1GiB", eager_ops=True, engine="eager", cache=False)
    run(tmp_path, llama(), [callback], bf16=True, gradient_accumulation_steps=accumulate, data=data, eval_strategy="no")
    assert callback.plan is not None
    assert callback.measured_peak == pytest.approx(callback.plan.predicted_peak, abs=64)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_whole_step_captured(tmp_path: Path) -> None:
    """Where the code looks at no data the whole step is one graph, smoothed labels and all."""

    def make() -> Any:
        return llama(attn_implementation="eager")

    both(tmp_path, make, KeeplessCallback(middle(make())), label_smoothing_factor=0.1)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_model_init_trains_anew(tmp_path: Path) -> None:
    """Each call of train() makes a model; each is planned, and the last has no plan in it after it."""
    budget = middle(llama())
    plans = []

    class Noting(KeeplessCallback):
        def on_train_end(self, *args: Any, **others: Any) -> None:
            plans.append(self.plan)
            super().on_train_end(*args, **others)

    callback = Noting(budget)
    ran = run(tmp_path, None, [callback], model_init=lambda: llama(), max_steps=2, save_strategy="no")
    first = {name: tensor.clone() for name, tensor in ran.model.state_dict().items()}
    ran.trainer.train()
    assert ran.trainer.model is not ran.model
    again = ran.trainer.model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert len(plans) == 2
    assert None not in plans
    assert plans[0] is not plans[1]
    assert "forward" not in ran.trainer.model.__dict__


class Small(nn.Module):
    """Wide in its activations: its step grows with the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)) for _ in range(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return {"loss": x.square().mean()}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.x = torch.randn(64, 64, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index]}


@pytest.mark.slow
def test_batch_size_is_searched(tmp_path: Path) -> None:
    """A batch for which nothing fits is told in accelerate's words, the loop begins anew with a smaller one, and
    that is planned."""
    model = Small()
    fits = keepless.estimate(
        model,
        {"x": torch.zeros(14, 64, 16)},
        optimizer=torch.optim.AdamW(model.parameters()),
        release_outputs=True,
        outside=14 * 64 * 16 * 4,  # the loader's next batch
    )
    callback = KeeplessCallback(int(fits.smallest_budget * 1.02))
    ran = run(
        tmp_path,
        model,
        [callback],
        data=Rows(),
        per_device_train_batch_size=16,
        auto_find_batch_size=True,
        max_steps=2,
        save_strategy="no",
        eval_strategy="no",
    )
    assert ran.trainer._train_batch_size == 14
    assert ran.trainer.state.global_step == 2
    assert callback.plan is not None
    assert callback.plan.num_replays > 0
    assert "forward" not in ran.model.__dict__
    with pytest.raises(keepless.InfeasibleBudget):
        run(tmp_path, Small(), [KeeplessCallback(200_000)], data=Rows(), save_strategy="no", eval_strategy="no")


@pytest.mark.slow
def test_optimizer_in_the_backward(tmp_path: Path) -> None:
    """A rewrite: the Trainer's own optimizer steps in the backward, and its loop stays as it is, but that it finds no
    gradients whose norm it could log."""
    options: dict[str, Any] = {"data": Rows(), "max_grad_norm": 0, "save_strategy": "no", "eval_strategy": "no"}
    plain = run(tmp_path, Small(), **options)
    callback = KeeplessCallback("1GiB", rewrites=("optimizer_in_backward",))
    ran = run(tmp_path, Small(), [callback], **options)
    assert set(differences(plain, ran)) <= {"losses"}  # transformers 4 logs no norm
    rows = [[row["loss"] for row in one.trainer.state.log_history if "loss" in row] for one in (plain, ran)]
    assert rows[0] == rows[1]
    assert callback.plan is not None
    assert callback.plan.rewrites == ("optimizer_in_backward",)


@pytest.mark.slow
def test_given_plan_and_given_loss(tmp_path: Path) -> None:
    """A plan that was made before trains without planning; a `compute_loss_func` needs its loss told for planning."""
    options: dict[str, Any] = {"data": Rows(), "max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
    first = KeeplessCallback("1GiB", outside="1MiB")
    one = run(tmp_path, Small(), [first], **options)
    assert first.plan is not None
    first.plan.save(tmp_path / "step.plan")
    second = KeeplessCallback(plan=tmp_path / "step.plan")
    two = run(tmp_path, Small(), [second], **options)
    assert differences(one, two) == []
    assert second.plan is not None
    assert second.plan.graph == first.plan.graph
    assert second.measured_peak is not None
    assert second.measured_peak == pytest.approx(first.measured_peak, abs=64)
    assert second.measured_peak > 1 << 20  # the plan's own bytes outside

    class NoLoss(Small):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            return {"hidden": super().forward(x)["loss"].expand(2, 2)}

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = outputs["hidden"].mean()
        return loss

    with pytest.raises(keepless.LossError, match="To KeeplessCallback"):
        run(
            tmp_path,
            NoLoss(),
            [KeeplessCallback("1GiB")],
            trainer_options={"compute_loss_func": compute_loss},
            **options,
        )
    callback = KeeplessCallback("1GiB", loss_fn=lambda output, batch: compute_loss(output, None))
    run(tmp_path, NoLoss(), [callback], trainer_options={"compute_loss_func": compute_loss}, **options)
    assert callback.plan is not None


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_is_refused_or_taken_over(tmp_path: Path, name: str) -> None:
    """The Trainer turns it on before the callback is asked."""
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", name: True}
    if not hasattr(llama(), "activation_checkpointing_enable") and name == "activation_checkpointing":
        pytest.skip("transformers 4 has the other name alone")
    model = llama()
    with pytest.raises(keepless.CheckpointingError, match="activation_checkpointing=False"):
        run(tmp_path, model, [KeeplessCallback("1GiB")], **options)
    assert "forward" not in model.__dict__
    if name == "gradient_checkpointing":
        return
    plain = run(tmp_path, llama(), **options)
    callback = KeeplessCallback(middle(llama()), takeover=True)
    ran = run(tmp_path, llama(), [callback], **options)
    assert differences(plain, ran) == []
    assert ran.model.is_activation_checkpointing  # as the Trainer left it
    assert callback.plan is not None
    assert callback.plan.num_replays > 0


def test_settings_that_are_refused() -> None:
    """Each with what to do about it."""
    model = nn.Linear(2, 2)
    fine: dict[str, Any] = {
        "deepspeed": None,
        "fsdp": [],
        "parallel_mode": SimpleNamespace(value="not_parallel"),
        "n_gpu": 1,
        "world_size": 1,
        "max_grad_norm": 1.0,
        "fp16": False,
    }
    refuse_settings(SimpleNamespace(**fine), model, ())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"deepspeed": "ds.json"}, "deepspeed="),
        ({"fsdp": "full_shard"}, "fsdp="),
        ({"parallel_mode": SimpleNamespace(value="not_distributed"), "n_gpu": 2}, "CUDA_VISIBLE_DEVICES"),
        ({"parallel_mode": SimpleNamespace(value="distributed"), "world_size": 2}, "torchrun"),
    ]
    for changed, words in cases:
        with pytest.raises(keepless.IntegrationError, match=words):
            refuse_settings(SimpleNamespace(**{**fine, **changed}), model, ())
    with pytest.raises(keepless.IntegrationError, match="spread each batch"):
        refuse_settings(SimpleNamespace(**fine), nn.DataParallel(model), ())
    spread = nn.Linear(2, 2)
    spread.hf_device_map = {"a": 0, "b": 1}  # type: ignore[assignment]
    with pytest.raises(keepless.IntegrationError, match="device_map"):
        refuse_settings(SimpleNamespace(**fine), spread, ())
    spread.hf_device_map = {"": 0}  # type: ignore[assignment]
    refuse_settings(SimpleNamespace(**fine), spread, ())
    rewrites = ("optimizer_in_backward",)
    with pytest.raises(keepless.IntegrationError, match="max_grad_norm=0"):
        refuse_settings(SimpleNamespace(**fine), model, rewrites)
    with pytest.raises(keepless.IntegrationError, match="bf16=True"):
        refuse_settings(SimpleNamespace(**{**fine, "max_grad_norm": 0, "fp16": True}), model, rewrites)
    refuse_settings(SimpleNamespace(**{**fine, "max_grad_norm": 0}), model, rewrites)


def test_arguments_that_are_refused() -> None:
    """Before any training."""
    with pytest.raises(keepless.IntegrationError, match="a budget, or a plan"):
        KeeplessCallback()
    with pytest.raises(TypeError, match="optimiser"):
        KeeplessCallback("1GiB", optimiser=None)
    with pytest.raises(keepless.BudgetError):
        KeeplessCallback("8 bananas")


@pytest.mark.slow
def test_lora(tmp_path: Path) -> None:
    """PEFT's adapters are what is trained; the base stays as it is."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")

    def make() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(llama(), config)

    both(tmp_path, make, KeeplessCallback(middle(make())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl(tmp_path: Path) -> None:
    """SFTTrainer with LoRA: a fused head whose loss is made of log-probabilities, and checkpointing by default."""
    trl = pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    datasets = pytest.importorskip("datasets", reason="TRL trains on datasets")
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    data = datasets.Dataset.from_list([{"input_ids": ids.tolist()} for ids in Tokens().ids])

    def train(callback: KeeplessCallback | None) -> tuple[dict[str, torch.Tensor], list[float]]:
        torch.manual_seed(0)
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=BATCH,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            bf16=False,
            max_length=LENGTH,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=callback is not None,
        )
        trainer = trl.SFTTrainer(
            model=llama(),
            args=args,
            train_dataset=data,
            processing_class=_words(),
            peft_config=peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
            callbacks=[callback] if callback is not None else [],
        )
        trainer.train()
        state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        return state, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    with pytest.raises(keepless.InfeasibleBudget) as failure:  # the head's tiles set the floor, not the layers
        train(KeeplessCallback(1000, takeover=True))
    callback = KeeplessCallback(int(failure.value.smallest_budget * 1.01), takeover=True)
    plain, losses = train(None)
    ours, own = train(callback)
    assert losses == own
    assert [name for name in plain if not torch.equal(plain[name], ours[name])] == []
    assert callback.plan is not None
    assert callback.plan.recomputed_nbytes > 0
    assert callback.measured_peak is not None
    assert callback.measured_peak <= callback.plan.budget.limits["device"]


def _words() -> Any:
    """A tokenizer of 128 words, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
