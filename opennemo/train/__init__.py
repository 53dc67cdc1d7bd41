"""Training: text to token shards, shards to packed windows, windows to a model.

It imports the tokenizer and the model, and never the engine.
"""
