"""The networks, each with its training objective, and the blocks they share.

May import `diffusion`, `draws`, `settings`.
"""
