"""Gradients that torch alone does not give: through rectifiers and rounding, and back along the layers of a model."""
