"""Comparisons for people: what a report says, as data, and the same as one HTML page or as Markdown."""
