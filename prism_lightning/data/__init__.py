"""Sources, tokenizer, packed token store, training order and the DataModule."""
