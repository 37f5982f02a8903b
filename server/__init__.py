"""The coordinating side: rounds, aggregation, central evaluation."""
