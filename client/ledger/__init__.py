"""Patients' privacy ledger: what was invoked on them, charged before it is computed."""
