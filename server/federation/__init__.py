"""One federated run: rounds, aggregation and evaluation."""
