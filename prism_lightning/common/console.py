"""The console that answers are printed on: standard output, in colours where it is a terminal."""

from rich.console import Console

console = Console()
