"""Membership attacks on federations, and the cost of privacy."""
