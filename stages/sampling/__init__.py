"""From texts and pictures to pixels, and contact sheets of them.

May import `models`.
"""
