"""Stages of training, one file each, found by their `kind`: what of a method is trained, and on which
rows."""
