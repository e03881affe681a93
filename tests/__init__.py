"""A package, so that none that something installed brings along under this name is taken for it."""
