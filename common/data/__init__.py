"""Cohorts, genes, scales and the statistics that sites share."""
