"""Attacks on the prediction and the explanation together."""
