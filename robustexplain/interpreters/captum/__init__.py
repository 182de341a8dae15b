"""captum's attribution methods, by name."""
