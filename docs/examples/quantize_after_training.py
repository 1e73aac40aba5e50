"""Train a model in full precision; a callback quantizes it on its training data, saves it, and optionally pushes it.

python docs/examples/quantize_after_training.py [--model NAME] [--text FILE] [--out FOLDER] [--steps 5] [--push me/name]
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.trainer import AwqQuantizeCallback

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(SHIPPED_MODEL), help="full-precision model; default: the shipped one")
parser.add_argument("--text", type=Path, default=SHIPPED_MODEL / "heldout.txt", help="text to train on")
parser.add_argument("--out", type=Path, default=Path("run"))
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--push", help="repository for the quantized model")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
token_ids = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids[:20_000]
rows = [token_ids[start : start + 128] for start in range(0, len(token_ids) - 128, 128)]

callback = AwqQuantizeCallback(AwqOffloadConfig(n_samples=32, max_seq_len=128), push_to_hub=options.push or False)
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"),
    args=TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        save_steps=options.steps,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"input_ids": rows}),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()

quantized = AutoModelForCausalLM.from_pretrained(options.out / "awq", device_map="auto")
size, full_size = quantized.get_memory_footprint(), trainer.model.get_memory_footprint()
print(f"{size / 1e6:.1f} MB instead of {full_size / 1e6:.1f} MB")
