"""Fused ops, each beside its plain twin."""
