"""What a person can ask for: a file a verb, whose `handle(words)` does it.

May import everything below.
"""
