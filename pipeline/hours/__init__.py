"""What the work has cost: the ledger added up, by step, run and lineage, beside the paper's; kg of CO2, and money.

May import `settings` and what is below it. Imports neither torch, Ray nor MLflow.
"""
