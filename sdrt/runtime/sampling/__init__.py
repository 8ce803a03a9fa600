"""Samplers as tables of numbers: schedules, levels, the formulas, and noise."""
