"""A recipe is one YAML file that holds one whole experiment: its schema, and the way from it to objects."""

from .checking import check_data
from .reach import short_of_reach
from .reader import check, find, read

__all__ = ["check", "check_data", "find", "read", "short_of_reach"]
