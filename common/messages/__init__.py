"""What travels, typed: the requests of the server and the replies of hospitals.

`to_records` writes a message as Flower carries it; `from_records` reads it, and refuses
by name a record or key that the message does not have. Whatever is wrong with it raises
`MessageError` and nothing else, so that it ends its sender's part, never the run.
docs/messages.md has the same tables; a test compares them.
"""
