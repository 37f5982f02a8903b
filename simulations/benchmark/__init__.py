"""What the models are worth: every method on the same splits, on unseen institutions.

One module a question (imputation, survival, classification, interpretation,
federation), each with a `run` that takes the common `Ground`. docs/results/ has what
came of it.
"""
