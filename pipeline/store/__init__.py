"""What lies under a root: artifacts, claims on them and who reads them, the ledger, requests to forget; and its inputs.

Without torch, ray and mlflow; may import `errors`, `environment`.
"""
