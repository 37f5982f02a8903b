"""Data of a simulation: drawn or read, and split into sites and a hold-out."""
