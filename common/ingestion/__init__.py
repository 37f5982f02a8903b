"""Read and check a hospital's files; return a cohort, or findings that refuse them."""
