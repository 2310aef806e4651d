"""Integrated gradients of neurons: quadrature, paths, the fast staircase and the slow reference."""
