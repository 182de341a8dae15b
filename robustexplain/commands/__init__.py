"""The verbs of the ``robustexplain`` command, one file each."""
