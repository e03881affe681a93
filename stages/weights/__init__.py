"""Weights by others and for others: which model a file holds, names of diffusers, the release folder.

May import `sampling` and `models`.
"""
