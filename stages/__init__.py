"""Models and maths of Würstchen: Stage A, compressor, Stage B, Stage C, diffusion, text, training loop.

Plain PyTorch. Nothing here knows Ray, MLflow, Hydra, or where data and checkpoints lie.
"""
