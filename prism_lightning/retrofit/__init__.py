"""Retrofitting: prototypes fitted to the hidden states of a frozen pretrained decoder."""
