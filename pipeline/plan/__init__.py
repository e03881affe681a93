"""What a run would do, why, and what it would cost, before anything starts: the DAG, its table, estimates, obstacles.

Without torch, ray and mlflow; may import `models`, `hours` and what is below it.
"""
