"""A run: steps one after the other, each under a claim, a ledger and a tracker, and what a person sees of it.

Starts steps by their name in the table; may import every room but `verbs` and `repair`.
"""
