"""What networks weigh and cost, in closed form from their settings: parameters, FLOPs, memory.

Without torch; may import `settings`.
"""
