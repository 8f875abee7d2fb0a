"""What every other package may use: files written whole, text that is safe to show."""
