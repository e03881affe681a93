"""Bytes by path: folders here and on object stores, files verified once.

Knows nothing of rows; imports nothing of ours.
"""
