"""Hostile and odd input: generated files and flags, and folders, names and surroundings by hand.

    python -m tests.hostile [INPUT ...]          1,000 generated cases of each input

Every case is read correctly or refused in one line that names the file; see `attempt`.
"""
