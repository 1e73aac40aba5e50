"""Quantized linears: `torch.nn` modules around packed weights."""
