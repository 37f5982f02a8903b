"""The report of a simulated federation: numbers and a page."""
