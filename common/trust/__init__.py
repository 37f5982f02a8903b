"""Keys, certificates, contracts, receipts and bundles: what is signed."""
