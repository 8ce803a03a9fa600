"""The networks that sdrt traces, in torch."""
