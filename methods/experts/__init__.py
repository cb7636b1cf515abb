"""Banks of experts, one file each, found by their `kind`: options, tensors and the equation of one bank."""
