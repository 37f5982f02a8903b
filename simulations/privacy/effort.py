"""How much `fedgex-sim` computes where nothing else is asked for."""

SHADOWS, CANARIES = 16, 200
"""Of an audit: shadow models, and made-up patients."""
EPSILONS = (1.0, 3.0, 8.0)
"""That `utility` compares."""
SEEDS = 3
"""Of `utility`."""
