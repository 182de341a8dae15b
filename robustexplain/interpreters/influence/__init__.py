"""Influence functions: training images as explanations."""
