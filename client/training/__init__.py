"""One round at one hospital: plain, private and secure."""
