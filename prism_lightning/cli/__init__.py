"""The command line: each group of verbs parses its options, calls the package and prints."""
