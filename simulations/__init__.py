"""Whole federations on one machine, with the very apps that hospitals run."""
