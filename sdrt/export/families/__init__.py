"""Families of models: everything that differs between them, in one frozen value each. No other package asks which
family a model is of.
"""
