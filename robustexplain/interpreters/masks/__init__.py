"""Interpreters that find a mask: MASK by optimisation, RTS by a trained network."""
