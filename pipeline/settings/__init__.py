"""What a person has set: the command line's words, the composed and checked config.

The only home of hydra; may import `store`.
"""
