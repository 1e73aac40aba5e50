"""Quantize a model, record its evaluation in the model card, push it, and load it from the Hub.

python docs/examples/push_and_load.py me/my-model-AWQ [--model NAME]
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.integrations.hub import record_evaluation
from hf_awq_offload.reporting.evaluation import evaluate, token_windows

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("repository")
parser.add_argument("--model", default=str(SHIPPED_MODEL), help="full-precision model; default: the shipped one")
options = parser.parse_args()

original = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", device_map="auto")
model = AutoModelForCausalLM.from_pretrained(
    options.model, dtype="auto", device_map="auto", quantization_config=AwqOffloadConfig(n_samples=32)
)

tokenizer = AutoTokenizer.from_pretrained(options.model)
text = (SHIPPED_MODEL / "heldout.txt").read_text(encoding="utf-8")
windows = token_windows(tokenizer(text, return_tensors="pt", verbose=False).input_ids[0], 256, count=4)
record_evaluation(model, "held-out documentation of Python", evaluate(model, windows, reference=original))

model.push_to_hub(options.repository, max_shard_size="5GB")  # with tokenizer and model card

loaded = AutoModelForCausalLM.from_pretrained(options.repository, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(options.repository)
inputs = tokenizer("Return a list of", return_tensors="pt").to(loaded.device)
print(tokenizer.decode(loaded.generate(**inputs, max_new_tokens=20)[0]))
