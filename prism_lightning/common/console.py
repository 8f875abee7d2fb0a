"""The console for results: standard output, with colours if it is a terminal."""

from rich.console import Console

console = Console()
