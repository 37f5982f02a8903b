"""Privacy accounting, secure randomness, and attacks that test both."""
