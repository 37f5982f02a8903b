"""Performance tests: time, memory and traffic as ratios."""
