"""Interpreters that change the backward pass: LRP, guided backpropagation, DeepLIFT."""
