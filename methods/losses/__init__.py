"""Auxiliary losses, one file each, found by their `kind`: pure functions of the routings of a pass."""
