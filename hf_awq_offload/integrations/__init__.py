"""Connects the pipeline to transformers, PEFT and the Hub."""
