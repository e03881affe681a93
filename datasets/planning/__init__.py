"""From a source's rows to the plan: filters, joined scores, key, shard and row of every picture.

May import `sources`.
"""
