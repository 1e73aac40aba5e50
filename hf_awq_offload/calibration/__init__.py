"""From any calibration data to the statistics of each linear's input."""
