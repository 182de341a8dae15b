"""Interpreters that find a mask: MASK and RelEx by optimisation, RTS by a trained network."""
