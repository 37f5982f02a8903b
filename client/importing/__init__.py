"""Recognise downloads of public portals, and make a hospital's files of them."""
