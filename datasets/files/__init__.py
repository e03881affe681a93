"""Bytes by path: folders here and on object stores, what must be new there, files verified once.

Knows nothing of rows; imports nothing of ours.
"""
