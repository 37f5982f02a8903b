"""A finished model on a hospital's own samples: predictions, files, audit."""
