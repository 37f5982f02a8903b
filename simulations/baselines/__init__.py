"""Reference models and single-site or pooled training."""
