"""Keepless: train a model inside a memory budget."""
