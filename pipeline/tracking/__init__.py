"""MLflow: what is recorded of a run, and how it gets there without anybody waiting for it.

The only home of mlflow; may import `plan` and what is below it.
"""
