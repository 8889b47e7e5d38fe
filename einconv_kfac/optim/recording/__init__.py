"""Recording of forward passes, of losses and of gradients."""
