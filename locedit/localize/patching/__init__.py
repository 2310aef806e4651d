"""Patching: pairs of prompts, the nodes that are patched, and runs with nodes replaced."""
