"""Transforms of images: what stands in front of a model."""
