"""Data, no code: one folder a model family with its template and card, and the default bundle among them."""
