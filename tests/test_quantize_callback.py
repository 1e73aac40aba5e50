"""The Trainer callback quantizes a copy of the trained model on its training data and leaves the model as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import Hub
from models import tiny_llama
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_awq_offload import (
    AwqLinear,
    AwqOffloadConfig,
    CalibrationDataError,
    ConfigError,
    ModelStructureError,
    NumericalError,
    quantize_model,
)
from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.trainer import AwqQuantizeCallback, training_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing.* is deprecated:FutureWarning",  # TRL 1.16 sets it
    "ignore:.*pin_memory.* argument is set as true but no accelerator:UserWarning",
)
ROWS, ROW_TOKENS = 12, 20


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    tokenizer.pad_token = "<unk>" if tokenizer.unk_token else tokenizer.eos_token
    return tokenizer


def recipe(**changes) -> AwqOffloadConfig:
    return AwqOffloadConfig(
        **{"n_grid": 2, "clip": False, "n_samples": 4, "max_seq_len": 16, "group_size": 32} | changes
    )


def shipped(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=dtype)


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(ROW_TOKENS // 2, ROW_TOKENS, (ROWS,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 60, (length,), generator=generator).tolist()} for length in lengths]
    )


def train(model: nn.Module, folder: Path, tokenizer, callback: AwqQuantizeCallback, **changes) -> Trainer:
    fields = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**fields | quiet | changes),
        train_dataset=rows(),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Witness(AwqQuantizeCallback):
    """Records the model's state when training ends."""

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.state = state_of(model)
        self.modules = [type(module) for module in model.modules()]
        super().on_train_end(args, state, control, model=model, **kwargs)


def assert_as_it_was(model: nn.Module, witness: Witness) -> None:
    assert [type(module) for module in model.modules()] == witness.modules
    state = model.state_dict()
    assert state.keys() == witness.state.keys()
    assert all(torch.equal(state[name], value) for name, value in witness.state.items())


def linears(model: nn.Module) -> int:
    return sum(isinstance(module, AwqLinear) for module in model.modules())


def test_the_trained_model_is_quantized_beside_the_checkpoints_and_stays_as_it_was(tokenizer, tmp_path):
    callback = Witness(recipe())
    trainer = train(shipped(), tmp_path, tokenizer, callback, save_strategy="steps", save_steps=1)
    assert_as_it_was(trainer.model, callback)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq", "checkpoint-1", "checkpoint-2"]
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "awq", dtype=torch.float32)
    assert linears(quantized) == 28
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, actual = trainer.model.eval()(tokens).logits, quantized(tokens).logits
    assert (actual - expected).norm() < 0.2 * expected.norm()
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(callback.state[norm], shipped().state_dict()[norm])  # it was trained
    assert AutoTokenizer.from_pretrained(tmp_path / "awq")("text").input_ids
    meta = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]["meta"]
    assert meta["dataset"].startswith(("training data (sha256:", "generator (sha256:"))
    assert str(tmp_path) not in (tmp_path / "awq" / "README.md").read_text()
    assert callback.report is not None
    assert len(callback.report.layers) == 4


def test_it_calibrates_on_the_rows_of_the_training_data_without_padding_whatever_the_labels(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = rows()
    batches = torch.utils.data.DataLoader(list(data), batch_size=5, collate_fn=collator)
    assert training_rows(batches, recipe(n_samples=100), bool) == data["input_ids"][:]
    few = training_rows(batches, recipe(n_samples=1), bool)
    assert few == data["input_ids"][:5]  # READ_FACTOR times n_samples, rounded up to whole batches
    for batch in ({"labels": torch.ones(1, 2)}, [torch.ones(1, 2)]):
        with pytest.raises(CalibrationDataError, match=r"expected input_ids.*`dataset`"):
            training_rows([batch], recipe(), bool)
    images = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(CalibrationDataError, match="pixel_values beside input_ids"):
        training_rows([images], recipe(), bool)


def test_adapters_are_merged_into_a_copy(tokenizer, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=["lm_head"])
    model = shipped()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    callback = Witness(recipe(), output_dir=tmp_path / "elsewhere" / "quantized")
    trainer = train(get_peft_model(model, config), tmp_path / "run", tokenizer, callback)
    assert_as_it_was(trainer.model, callback)
    assert not (tmp_path / "run" / "awq").exists()
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "quantized", dtype=torch.float32)
    assert linears(quantized) == 28
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, actual = trainer.model.eval()(tokens).logits, quantized(tokens).logits
    assert (actual - expected).norm() < 0.3 * expected.norm()
    trained = trainer.model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(quantized.lm_head.weight, trained)


@pytest.mark.slow
def test_chat_data_of_the_sft_trainer_calibrates_as_its_template_renders_it(tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    chats = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number, {i * i}."}]
        for i in range(8)
    ]
    seen = []

    class Spy(AwqQuantizeCallback):
        def _quantize(self, model, recipe, *args) -> None:
            seen.extend(recipe.dataset)
            super()._quantize(model, recipe, *args)

    trainer = SFTTrainer(
        model=shipped(),
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_length=64, use_cpu=True,
            bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
        callbacks=[Spy(recipe())],
    )  # fmt: skip
    trainer.train()
    texts = {tokenizer.decode(row) for row in seen}
    assert texts
    assert texts <= {tokenizer.decode(tokenizer.apply_chat_template(chat)["input_ids"]) for chat in chats}
    assert linears(AutoModelForCausalLM.from_pretrained(tmp_path / "awq")) == 28


def test_a_data_set_in_the_config_goes_first(tokenizer, tmp_path):
    train(tiny(tokenizer), tmp_path, tokenizer, AwqQuantizeCallback(recipe(dataset=[list(range(3, 40))] * 3)))
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert "training data" not in config["meta"]["dataset"]
    assert config["meta"]["calibration_tokens"] <= 3 * 37


def tiny(tokenizer) -> PreTrainedModel:
    return tiny_llama(vocab_size=len(tokenizer))


def test_a_checkpoint_of_an_earlier_run_is_replaced_and_kept_if_the_new_one_fails(tokenizer, tmp_path, caplog):
    train(tiny(tokenizer), tmp_path, tokenizer, AwqQuantizeCallback(recipe()))
    card = tmp_path / "awq" / "README.md"
    card.write_text("of the first run")
    train(tiny(tokenizer), tmp_path, tokenizer, AwqQuantizeCallback(recipe()))
    assert card.read_text() != "of the first run"
    assert [path.name for path in tmp_path.iterdir()] == ["awq"]
    card.write_text("of the second run")
    model = tiny(tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    callback = Witness(recipe())
    with pytest.raises(NumericalError):
        train(model, tmp_path, tokenizer, callback, learning_rate=0.0)
    assert card.read_text() == "of the second run"
    (unfinished,) = (path for path in tmp_path.iterdir() if path.name != "awq")
    kept = AutoModelForCausalLM.from_pretrained(unfinished / "full-precision")
    assert kept.state_dict().keys() == callback.state.keys()  # nothing that was trained is lost


def test_what_can_not_be_quantized_is_refused_before_the_first_step(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="pass an AwqOffloadConfig"):
        AwqQuantizeCallback({"bits": 4})
    quantized = quantize_model(tiny(tokenizer), recipe(n_grid=0, rounding="nearest"))
    adapters = tiny(tokenizer)
    adapters.add_adapter(LoraConfig(target_modules=["q_proj"]))
    prompt = get_peft_model(tiny(tokenizer), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    a_file = AwqQuantizeCallback(recipe(), output_dir=__file__)
    with pytest.raises(ConfigError, match=r"output_dir .*\.py is a file; name a folder"):
        train(tiny(tokenizer), tmp_path, tokenizer, a_file)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.tex is not part of a checkpoint"):
        train(tiny(tokenizer), tmp_path, tokenizer, AwqQuantizeCallback(recipe(), output_dir=tmp_path / "precious"))
    for model, message in (
        (get_peft_model(quantized, LoraConfig(target_modules="all-linear")), "quantized already"),
        (adapters, "get_peft_model"),
        (prompt, "learns a prompt"),
    ):
        with pytest.raises(ModelStructureError, match=message):
            train(model, tmp_path, tokenizer, AwqQuantizeCallback(recipe()))
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "thesis.tex"]


def test_a_mistyped_module_is_an_error_before_the_first_step(tokenizer, tmp_path):
    callback = AwqQuantizeCallback(recipe(modules_to_not_convert=["lm_head", "down_porj"]))
    with pytest.raises(ConfigError, match=r"'down_porj', which names no module .*'down_proj'"):
        train(get_peft_model(tiny(tokenizer), LoraConfig(target_modules=["q_proj"])), tmp_path, tokenizer, callback)
    assert list(tmp_path.iterdir()) == []


PUSH = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
import test_quantize_callback as tests
folder = Path(sys.argv[1])
tokenizer = tests.AutoTokenizer.from_pretrained(tests.SHIPPED_MODEL)
tokenizer.pad_token = tokenizer.eos_token
callback = tests.AwqQuantizeCallback(tests.recipe(), push_to_hub=True)
tests.train(tests.tiny(tokenizer), folder, tokenizer, callback, hub_model_id="tester/tuned")
callback = tests.AwqQuantizeCallback(tests.recipe(), push_to_hub="tester/by-name")
tests.train(tests.tiny(tokenizer), folder, tokenizer, callback)
"""


@pytest.mark.slow
def test_it_is_pushed_where_the_arguments_say(tmp_path):
    with Hub("hf_" + "onlyForThisTest") as hub:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", PUSH, str(tmp_path / "run"), str(Path(__file__).parent)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert hub.token not in result.stdout + result.stderr
    assert set(hub.repositories) == {"tester/tuned-AWQ", "tester/by-name"}
    for repository in hub.repositories.values():
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= repository.files.keys()
        assert str(tmp_path).encode() not in repository.files["README.md"]


RANKS = r"""
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
import torch.distributed as dist
import test_quantize_callback as tests
folder = Path(sys.argv[1])
tokenizer = tests.AutoTokenizer.from_pretrained(tests.SHIPPED_MODEL)
tokenizer.pad_token = tokenizer.eos_token
callback = tests.AwqQuantizeCallback(tests.recipe())
tests.train(tests.tiny(tokenizer), folder / "run", tokenizer, callback, ddp_backend="gloo")
assert (folder / "run" / "awq" / "config.json").exists()  # on every rank: the others have waited
said = folder / f"rank{dist.get_rank()}"
said.write_text(f"{callback.report is not None}\n")
callback = tests.AwqQuantizeCallback(tests.recipe(dataset=[[1]]))
try:
    tests.train(tests.tiny(tokenizer), folder / "failing", tokenizer, callback, ddp_backend="gloo")
except Exception as error:
    said.write_text(f"{said.read_text()}{type(error).__name__} {'usable tokens' in str(error)}\n")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_in_distributed_training_one_rank_quantizes_and_the_others_wait_or_fail_with_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command = [*launch, str(script), str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    said = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(2)]
    assert said == [["True", "CalibrationDataError True"], ["False", "RuntimeError True"]]
