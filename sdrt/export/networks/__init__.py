"""The networks that are traced, in torch."""
