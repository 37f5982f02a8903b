"""Inside one hospital: the only code that sees patient rows."""
