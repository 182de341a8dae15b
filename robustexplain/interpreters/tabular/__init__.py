"""Interpreters of table rows: the lime and shap packages."""
