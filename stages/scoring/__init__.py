"""How good pictures are: retrieval, PSNR, PickScore, LAION's aesthetic score, and their statistics.

May import `state_dicts`.
"""
