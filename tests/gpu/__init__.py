"""What runs on a CUDA device."""
