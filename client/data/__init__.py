"""From a hospital's files to a checked cohort, or to the findings that refuse them."""
