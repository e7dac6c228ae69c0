"""Modelling files that travel with exported checkpoints. They import transformers only."""
