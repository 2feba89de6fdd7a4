"""Priorities: how likely each slot is to be drawn."""
