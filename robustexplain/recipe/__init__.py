"""A recipe is one YAML file that holds one whole experiment: its schema, and the way from it to objects."""

from .checking import check_data
from .reader import check, find, read

__all__ = ["check", "check_data", "find", "read"]
