"""Interpreters that differentiate the prediction by the input."""
