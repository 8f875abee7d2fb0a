"""Prototype attribution against EK-FAC, TRAK, a gradient index and simpler methods: cost, memory and quality."""
