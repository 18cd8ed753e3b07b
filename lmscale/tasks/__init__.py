"""Tasks: files of examples to the arrays of a micro batch, and predictions to metrics. Numpy alone, no torch."""
