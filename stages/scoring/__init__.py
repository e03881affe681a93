"""How good pictures are: scorers on one CLIP, likeness to originals, retrieval; and the statistics of comparisons.

May import `models`, `state_dicts`, `weight_files`, `settings`.
"""
