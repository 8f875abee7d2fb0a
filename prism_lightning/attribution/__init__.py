"""From a generated token back to the training tokens, passages and documents that made the model say it.

Nothing is imported here, so that a process which only queries an index (`spaces.py`, numpy alone) stays small.
"""
