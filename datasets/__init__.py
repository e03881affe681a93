"""Rows and shards: metadata sources, filters, fetching, shard formats, training batches.

This package is run from the checkout and is deliberately called `datasets`, so it shadows Hugging Face's package of
that name. Nothing we use needs that one; two things would: `transformers.Trainer` data loaders and
`ray.data.from_huggingface`. Never build this project as a wheel: it would overwrite the other package's files.
"""
