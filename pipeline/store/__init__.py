"""What lies under a root: artifacts, claims on them, the ledger, requests to forget; and what its inputs hold.

Without torch, ray and mlflow; may import `errors`, `environment`, `terminal`.
"""
