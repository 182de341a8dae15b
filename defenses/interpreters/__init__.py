"""Defenses that harden the interpreter."""
