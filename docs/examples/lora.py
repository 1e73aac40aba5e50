"""Quantize a model, train LoRA adapters on it with the Trainer, save them, and optionally push them.

python docs/examples/lora.py [--model NAME] [--text FILE] [--out FOLDER] [--steps 20] [--push me/my-adapters]
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.cli.demo import SHIPPED_MODEL

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(SHIPPED_MODEL), help="full-precision model; default: the shipped one")
parser.add_argument("--text", type=Path, default=SHIPPED_MODEL / "heldout.txt", help="text to train on")
parser.add_argument("--out", type=Path, default=Path("lora"))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--push", help="repository for the adapters")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

# 1. Quantize, and keep the checkpoint: the adapters fit only these weights.
model = AutoModelForCausalLM.from_pretrained(
    options.model, dtype="auto", device_map="auto", quantization_config=AwqOffloadConfig(n_samples=32)
)
model.save_pretrained(options.out / "base")

# 2. Train adapters on all quantized linears.
token_ids = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids[:20_000]
rows = [token_ids[start : start + 128] for start in range(0, len(token_ids) - 128, 128)]
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(options.out / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=options.steps,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"input_ids": rows}),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.train()

# 3. Save and push only the adapters; then load them onto the quantized base.
model.save_pretrained(options.out / "adapters")
if options.push:
    model.push_to_hub(options.push)
base = AutoModelForCausalLM.from_pretrained(options.out / "base", device_map="auto")
loaded = PeftModel.from_pretrained(base, options.out / "adapters")
inputs = tokenizer("Return a list of", return_tensors="pt").to(base.device)
print(tokenizer.decode(loaded.generate(**inputs, max_new_tokens=20)[0]))
