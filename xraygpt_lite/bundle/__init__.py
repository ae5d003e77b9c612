"""Bundles: the folder that holds one model, what its manifest may say, and where bundles are kept."""
