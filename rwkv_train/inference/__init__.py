"""Inference: loading a checkpoint's model and tokenizer, generation, export to other formats."""
