"""Quantized linears: `torch.nn` modules that hold packed weights."""
