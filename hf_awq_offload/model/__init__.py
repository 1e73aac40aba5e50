"""What a model is made of: decoder layers, linears, experts, and where a scale can be folded. Measured, not listed."""
