"""Where weights, hidden states and results are, and how a decoder layer gets onto the device and back."""
