"""Hugging Face directories to checkpoints and back: tables of names and shapes, one for each architecture."""
