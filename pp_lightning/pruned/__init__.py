"""Mechanism: decoder layers that choose per batch and run on what they chose."""
