"""Which messages are admitted: contracts, approvals, the gate."""
