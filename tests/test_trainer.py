"""The Trainer and TRL's SFTTrainer train adapters on the shipped model, quantized, for real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_awq_offload import AwqLinear, AwqOffloadConfig, ModelStructureError, quantize_model
from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.reporting.evaluation import evaluate, token_windows

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing.* is deprecated:FutureWarning",  # TRL 1.16 sets it
    "ignore:.*pin_memory.* argument is set as true but no accelerator:UserWarning",
    "ignore:Please use the new API settings to control TF32:UserWarning",
)
SEQUENCE_TOKENS = 64
TRAINING_CHARACTERS = 60_000
HELD_OUT_WINDOWS = 24
STEPS = 12


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    """Two parts of text that the shipped model has not seen: one to train on, one to evaluate on."""
    text = (SHIPPED_MODEL / "heldout.txt").read_text(encoding="utf-8")
    return text[:TRAINING_CHARACTERS], text[TRAINING_CHARACTERS:]


@pytest.fixture(scope="module")
def windows(tokenizer, texts) -> list[torch.Tensor]:
    token_ids = tokenizer(texts[1], return_tensors="pt", verbose=False).input_ids[0]
    return token_windows(token_ids, SEQUENCE_TOKENS, HELD_OUT_WINDOWS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The shipped model rounded to nearest in 4 bits, so that training can win back what is lost."""
    folder = tmp_path_factory.mktemp("quantized")
    recipe = AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest")
    AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype="auto", quantization_config=recipe).save_pretrained(
        folder
    )
    return folder


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


def sequences(tokenizer, text: str) -> Dataset:
    token_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return Dataset.from_dict(
        {"input_ids": [window[0].tolist() for window in token_windows(token_ids, SEQUENCE_TOKENS)]}
    )


def arguments(folder: Path, **changes) -> TrainingArguments:
    fields = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(**fields | changes)


def trainer_of(model, tokenizer, texts, folder: Path, **changes) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=sequences(tokenizer, texts[0]),
        eval_dataset=sequences(tokenizer, texts[1][:3000]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def adapter(r: int = 8) -> LoraConfig:
    torch.manual_seed(0)
    return LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bf16"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16, autocast", "bf16"],
)
def test_training_lowers_the_loss_and_beats_the_quantized_base_on_held_out_text(
    dtype, bf16, checkpoint, tokenizer, texts, windows, tmp_path
):
    base = load(checkpoint, dtype)
    before = evaluate(base, windows).perplexity
    packed = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, adapter())
    trainer = trainer_of(model, tokenizer, texts, tmp_path, bf16=bf16)
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.evaluate()["eval_loss"] < loss_before
    after = evaluate(model.get_base_model(), windows).perplexity
    assert after < before
    trained = model.unload().state_dict()
    assert trained.keys() == packed.keys()
    assert all(torch.equal(trained[name], packed[name]) for name in packed)  # the base is frozen


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(checkpoint, tokenizer, texts, tmp_path):
    """One run and two halves of it give the same adapters, to the bit."""
    schedule = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4, "seed": 1}
    whole = trainer_of(
        get_peft_model(load(checkpoint), adapter()), tokenizer, texts, tmp_path / "whole", max_steps=8, **schedule
    )
    whole.train()
    half = trainer_of(
        get_peft_model(load(checkpoint), adapter()), tokenizer, texts, tmp_path / "half", max_steps=4, **schedule
    )
    half.train()
    saved = tmp_path / "half" / "checkpoint-4"
    assert not list(saved.glob("model*.safetensors"))  # adapters only
    resumed = trainer_of(
        get_peft_model(load(checkpoint), adapter()), tokenizer, texts, tmp_path / "half", max_steps=8, **schedule
    )
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 8
    expected = {name: value for name, value in whole.model.named_parameters() if value.requires_grad}
    actual = {name: value for name, value in resumed.model.named_parameters() if value.requires_grad}
    assert expected
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path / "half" / "checkpoint-8")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_sft_trainer_trains_evaluates_saves_and_resumes(checkpoint, tokenizer, texts, windows, tmp_path):
    paragraphs = Dataset.from_dict({"text": [part for part in texts[0].split("\n\n") if len(part) > 200]})
    held_out = Dataset.from_dict({"text": [part for part in texts[1].split("\n\n") if len(part) > 200][:16]})
    base = load(checkpoint)
    before = evaluate(base, windows).perplexity

    def trainer(model, steps: int) -> SFTTrainer:
        fields = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=6).to_dict()
        names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "use_cpu")
        config = SFTConfig(
            **{name: fields[name] for name in (*names, "disable_tqdm", "save_steps", "save_strategy")},
            report_to="none",
            max_length=SEQUENCE_TOKENS,
            dataset_text_field="text",
            bf16=False,
        )
        return SFTTrainer(
            model=model,
            args=config,
            train_dataset=paragraphs,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=adapter(),
        )

    first = trainer(base, 6)
    loss_before = first.evaluate()["eval_loss"]
    first.train()
    second = trainer(load(checkpoint), STEPS)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == STEPS
    assert second.evaluate()["eval_loss"] < loss_before
    assert sum(isinstance(module, AwqLinear) for module in second.model.modules()) == 28
    assert evaluate(second.model.get_base_model(), windows).perplexity < before


def test_without_adapters_transformers_says_that_they_are_missing(checkpoint, tokenizer, texts, tmp_path):
    with pytest.raises(ValueError, match=r"purely quantized models.*attach trainable adapters"):
        trainer_of(load(checkpoint), tokenizer, texts, tmp_path)


def test_an_offloaded_model_is_refused_before_training_starts(tokenizer, texts, tmp_path):
    recipe = AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest", group_size=32)
    quantize_model(tiny_llama(), recipe).save_pretrained(tmp_path / "model")
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys(on_cpu, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises(ModelStructureError, match=r"model\.layers\.1\.\S+ is offloaded.*device_map="):
        trainer_of(model, tokenizer, texts, tmp_path)
