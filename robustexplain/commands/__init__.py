"""The verbs of the ``robustexplain`` command, one file each.

Help must be fast: a verb's file imports torch, and everything that does, inside its functions.
"""
