"""Prompts, the procedural scene world and image corpora."""
