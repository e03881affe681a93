"""What networks weigh and cost, in closed form from their settings. Without torch; may import `settings`.

`blocks` tells of every block what it weighs, computes and keeps, `architectures` of every network which blocks it has;
`parameters`, `flops` and `memory_estimate` are three sums over these.
"""
