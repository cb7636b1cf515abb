"""Rules, one file each, found by their `kind`: what a method does at fixed moments of its training."""
