"""The one training loop: ranks, saved states, validation, and what is measured.

May import `models` and `anatomy`.
"""
