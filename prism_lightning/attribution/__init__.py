"""Attribution of a model's predictions to training tokens, passages and documents.

Nothing is imported here, so that a process that only queries an index (`index/opening.py`, numpy alone) stays small.
"""
