"""Secure aggregation: the protocol and its messages."""
