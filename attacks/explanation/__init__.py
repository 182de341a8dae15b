"""Attacks on the explanation that keep the prediction."""
