"""From artifacts and existing weights to models in memory, and what these make of captions and pictures.

May import `settings` and `store`.
"""
