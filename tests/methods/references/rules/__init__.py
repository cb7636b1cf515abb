"""Rules: what they do at each moment that the product's rule defines, by loops.

    after_backward(rule, bank) -> new gradients by tensor name, of one BankView whose tensors have theirs
    after_step(rule, site, chosen) -> new buffers by tensor name, of one Site; chosen: of each real token of
    the
        step, the selected experts

`rule` is the product's, for its options alone. All in fp64.
"""

REQUIRED = ()
MOMENTS = ("after_backward", "after_step")
