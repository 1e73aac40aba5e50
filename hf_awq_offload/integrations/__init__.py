"""transformers, PEFT and the Hub: adapters between their interfaces and the pipeline."""
