"""Attacks on the prediction alone."""
