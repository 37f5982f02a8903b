"""Federations on one machine.

`run` and `rehearse` run the apps of server and hospitals. Comparisons, audit and
utility train the same rounds in memory, without messages (training.py).
"""
