"""The network, its heads and losses, how it is trained and stored."""
