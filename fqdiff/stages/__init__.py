"""Stages: pure functions from values to a value. They never import each other and never touch a path."""
