"""Lightning callbacks, each in a file of its own."""
