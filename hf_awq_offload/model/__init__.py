"""Finds a model's decoder layers, linears, experts and possible folds by measuring it, not by listing architectures."""
