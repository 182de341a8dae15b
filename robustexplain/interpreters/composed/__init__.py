"""Interpreters made of other interpreters."""
