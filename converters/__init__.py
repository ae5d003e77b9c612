"""Turns published checkpoints into bundles: the only room that imports torch, and what only conversion needs."""
