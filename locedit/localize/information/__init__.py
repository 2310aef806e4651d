"""Fisher information: every example's own squared gradient, from one pass over a batch."""
