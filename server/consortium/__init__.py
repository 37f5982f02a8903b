"""A consortium on disk: members, contracts, runs and releases."""
