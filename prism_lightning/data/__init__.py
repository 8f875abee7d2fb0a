"""Data: sources of documents, the tokenizer, preparation, the packed token store and the training order."""
