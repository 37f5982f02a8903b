"""Privacy ledger of a hospital's patients, debited before each computation."""
